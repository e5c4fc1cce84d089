"""What a training notes in its run's folder, line by line. None of it is refused: what was cut off
or damaged is left out.

    metrics.jsonl    one object a logged step
    history.jsonl    one for each time that the training began or went on: at which step, when, on
                     what, which settings were changed, and what it was said to take; and one for
                     each time that it went back, after its loss had leapt
    samples.txt      what the model wrote at each evaluation
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlxgpt import files
from mlxgpt.settings import LARGEST

METRICS, SAMPLES, HISTORY = "metrics.jsonl", "samples.txt", "history.jsonl"
SAMPLE_HEAD = re.compile(r"--- step (\d{1,18})\n", re.ASCII)


@dataclass(frozen=True)
class Notes:
    """Those in one run's folder. What is read from it was perhaps written by a stranger."""

    folder: Path

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line of metrics."""
        self._append(METRICS, record)

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
        self._append(HISTORY, {"step": step, "time": _now(), **on})

    def add_return(self, step: int, spiked: int) -> None:
        """Note that the training went back to a step, since its loss had leapt at a later one."""
        self._append(HISTORY, {"step": step, "time": _now(), "spiked": spiked})

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
        with (self.folder / SAMPLES).open("a", encoding="utf-8", newline="") as file:
            file.write(f"--- step {step}\n{text}\n\n")

    def samples(self, longest: int) -> Iterator[tuple[int, str]]:
        """What the model wrote at each evaluation: (step, text), a text that is longer cut."""
        step, text = None, ""
        with contextlib.suppress(OSError):
            path = self.folder / SAMPLES
            with path.open(encoding="utf-8", errors="replace", newline="") as file:
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
        are not, its sample goes too.
        """
        kept = {record["step"]: record for record in self.metrics() if record["step"] <= step}
        lines = [json.dumps(record) + "\n" for record in kept.values()]
        last = step if step in kept else step - 1
        for name, content in ((METRICS, lines), (SAMPLES, self._samples_until(last))):
            if files.exists(self.folder / name):
                files.write_atomically(self.folder / name, "".join(content))
        return step in kept

    def sync_notes(self) -> None:
        """Make the disk hold what was noted."""
        for name in (METRICS, SAMPLES, HISTORY):
            with contextlib.suppress(FileNotFoundError):
                files.sync(self.folder / name)
        files.sync(self.folder)  # which holds their names

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        try:
            file = (self.folder / name).open("rb")
        except OSError:
            return
        with file:
            for line in file:
                with contextlib.suppress(ValueError):
                    record = files.parse_json(line.decode("utf-8"))
                    step = record.get("step") if isinstance(record, dict) else None
                    if isinstance(step, int) and 0 <= step <= LARGEST:
                        yield record

    def _samples_until(self, step: int) -> Iterator[str]:
        try:
            file = (self.folder / SAMPLES).open(encoding="utf-8", errors="replace", newline="")
        except OSError:
            return
        with file:
            for line in file:
                if (head := SAMPLE_HEAD.fullmatch(line)) and int(head[1]) > step:
                    return
                yield line.replace("\0", "")  # a file that lost its power may end with them


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
