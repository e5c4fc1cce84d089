"""What a training notes in its run's folder, line by line. None of it is refused: what was cut off
or damaged is left out. A file that is not there is empty; one that cannot be read is an OSError.

    metrics.jsonl    one object a logged step
    history.jsonl    one for each time that the training began or went on: at which step, when, on
                     what, which settings were changed, and what it was said to take; and one for
                     each time that it went back, after its loss had leapt
    samples.txt      what the model wrote at each evaluation
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from mlxgpt.config.schema import LARGEST
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

IDENTITY = "run.json"
METRICS, SAMPLES, HISTORY = "metrics.jsonl", "samples.txt", "history.jsonl"
SAMPLE_HEAD = re.compile(r"--- step (\d{1,18})\n", re.ASCII)


@dataclass(frozen=True)
class Notes:
    """Those in one run's folder. What is read from it was perhaps written by a stranger.

    Attributes:
        descriptor: of the folder, while a training holds it: see `storage.run.held`.
    """

    folder: Path
    descriptor: int | None = field(default=None, kw_only=True, compare=False)

    def must_be_there(self) -> None:
        """Before each write of a training: a folder that was deleted must not be created again, and
        one that was put in its place is not this run's.

        Raises:
            UserError: if the folder that is held was deleted, moved or replaced.
        """
        if self.descriptor is None:
            return
        if not files.is_at(self.descriptor, self.folder) or not files.exists(
            self.folder / IDENTITY
        ):
            raise UserError(
                f"the run's folder {self.folder} is no longer there: training stopped",
                "to resume a run that was moved, name its folder: --run FOLDER.",
            )

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line of metrics."""
        self._append(METRICS, json.dumps(record) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics, each with its step."""
        return self._lines(METRICS)

    def noted(self, step: int) -> bool:
        """Whether a step's metrics are there."""
        return any(record["step"] == step for record in self.metrics())

    def add_to_history(
        self,
        step: int,
        surroundings: Mapping[str, str],
        changed: Mapping[str, tuple[Any, Any]],
        forecast: Mapping[str, float | None],
    ) -> None:
        """Note that the training begins, or goes on, from a step: on what, with which settings
        changed, name -> (old, new), and what it was said to take.
        """
        on = {"on": dict(surroundings), "changed": dict(changed), "forecast": dict(forecast)}
        self._add_history(step, on)

    def add_return(self, step: int, spiked: int) -> None:
        """Note that the training went back to a step, since its loss had leapt at a later one."""
        self._add_history(step, {"spiked": spiked})

    def _add_history(self, step: int, content: Mapping[str, Any]) -> None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        self._append(HISTORY, json.dumps({"step": step, "time": time, **content}) + "\n")

    def history(self) -> Iterator[dict[str, Any]]:
        """The lines of its history, each with its step."""
        return self._lines(HISTORY)

    def surroundings(self) -> dict[str, str]:
        """On what it was last trained; {} where that is not known."""
        last = deque((line["on"] for line in self.history() if "on" in line), maxlen=1)
        on = last[0] if last else None
        return {str(k): str(v) for k, v in on.items()} if isinstance(on, dict) else {}

    def add_sample(self, step: int, text: str) -> None:
        """Append what the model wrote at a step."""
        self._append(SAMPLES, f"--- step {step}\n{text}\n\n")

    def samples(self, longest: int) -> Iterator[tuple[int, str]]:
        """What the model wrote at each evaluation: (step, text), a text that is longer cut."""
        step, text = None, ""
        with self._opened(SAMPLES) as content, _as_text(content) as file:
            while line := file.readline(longest):
                if head := SAMPLE_HEAD.fullmatch(line):
                    if step is not None:
                        yield step, text.strip("\n")
                    step, text = int(head[1]), ""
                else:
                    text += line[: max(0, longest - len(text))]
        if step is not None:
            yield step, text.strip("\n")

    def cut(self, step: int) -> bool:
        """Forget what was noted after a step; whether that step's own metrics are there. Where they
        are not, its sample goes too. Nothing is written before all was read.
        """
        kept = {record["step"]: record for record in self.metrics() if record["step"] <= step}
        last = step if step in kept else step - 1
        texts = {
            METRICS: "".join(json.dumps(record) + "\n" for record in kept.values()),
            SAMPLES: "".join(self._samples_until(last)),
        }
        there = [name for name in texts if files.exists(self.folder / name)]
        self.must_be_there()
        for name in there:
            files.write_atomically(self.folder / name, texts[name])
        return step in kept

    def sync_notes(self) -> None:
        """Make the disk hold what was noted."""
        for name in (METRICS, SAMPLES, HISTORY):
            with contextlib.suppress(FileNotFoundError):
                files.sync(self.folder / name)
        files.sync(self.folder)  # which holds their names

    def _append(self, name: str, text: str) -> None:
        self.must_be_there()
        path = self.folder / name
        with files.naming(path), path.open("a+b") as file:
            # A full disk, or a kill, may have cut off the last line.
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                text = f"\n{text}"
            file.write(text.encode())

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        """A file of notes; an empty one where there is none."""
        path = self.folder / name
        try:
            file: IO[bytes] = path.open("rb")
        except FileNotFoundError:
            file = io.BytesIO()
        with files.naming(path), file:
            yield file

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        with self._opened(name) as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    record = files.parse_json(line.decode("utf-8"))
                    step = record.get("step") if isinstance(record, dict) else None
                    if isinstance(step, int) and 0 <= step <= LARGEST:
                        yield record

    def _samples_until(self, step: int) -> Iterator[str]:
        lines: list[str] = []  # since the last empty one, as a kill may cut off a sample's head
        with self._opened(SAMPLES) as content, _as_text(content) as file:
            for line in file:
                if (head := SAMPLE_HEAD.fullmatch(line)) and int(head[1]) > step:
                    return
                lines.append(line.replace("\0", ""))  # a file that lost its power may end with them
                if line == "\n":
                    yield from lines
                    lines = []


def _as_text(content: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(content, "utf-8", "replace", newline="")
