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

from mlxgpt.config.schema import MAX_INT
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

RUN_FILE = "run.json"
METRICS_FILE, SAMPLES_FILE, HISTORY_FILE = "metrics.jsonl", "samples.txt", "history.jsonl"
SAMPLE_HEADER = re.compile(r"--- step (\d{1,18})\n", re.ASCII)


@dataclass(frozen=True)
class RunLogs:
    """Those in one run's folder. What is read from it was perhaps written by a stranger.

    Attributes:
        folder_fd: of the folder, while a training holds it: see `storage.run.held`.
    """

    folder: Path
    folder_fd: int | None = field(default=None, kw_only=True, compare=False)

    def check_folder_exists(self) -> None:
        """Before each write of a training: a folder that was deleted must not be created again, and
        one that was put in its place is not this run's.

        Raises:
            UserError: if the folder that is held was deleted, moved or replaced.
        """
        if self.folder_fd is None:
            return
        if not files.is_same_file(self.folder_fd, self.folder) or not files.exists(
            self.folder / RUN_FILE
        ):
            raise UserError(
                f"the run's folder {self.folder} is no longer there: training stopped",
                "to resume a run that was moved, name its folder: --run FOLDER.",
            )

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line of metrics."""
        self._append(METRICS_FILE, json.dumps(record) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics, each with its step."""
        return self._read_records(METRICS_FILE)

    def has_metrics(self, step: int) -> bool:
        """Whether a step's metrics are there."""
        return any(record["step"] == step for record in self.metrics())

    def log_session_start(
        self,
        step: int,
        environment: Mapping[str, str],
        changed: Mapping[str, tuple[Any, Any]],
        estimate: Mapping[str, float | None],
    ) -> None:
        """Note that the training begins, or goes on, from a step: on what, with which settings
        changed, name -> (old, new), and what it was said to take.
        """
        session = {"on": dict(environment), "changed": dict(changed), "forecast": dict(estimate)}
        self._append_history(step, session)

    def log_rollback(self, step: int, spike_step: int) -> None:
        """Note that the training went back to a step, since its loss had leapt at a later one."""
        self._append_history(step, {"spiked": spike_step})

    def _append_history(self, step: int, extra: Mapping[str, Any]) -> None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        self._append(HISTORY_FILE, json.dumps({"step": step, "time": time, **extra}) + "\n")

    def history(self) -> Iterator[dict[str, Any]]:
        """The lines of its history, each with its step."""
        return self._read_records(HISTORY_FILE)

    def last_environment(self) -> dict[str, str]:
        """On what it was last trained; {} where that is not known."""
        last = deque((line["on"] for line in self.history() if "on" in line), maxlen=1)
        environment = last[0] if last else None
        return (
            {str(k): str(v) for k, v in environment.items()}
            if isinstance(environment, dict)
            else {}
        )

    def add_sample(self, step: int, text: str) -> None:
        """Append what the model wrote at a step."""
        self._append(SAMPLES_FILE, f"--- step {step}\n{text}\n\n")

    def samples(self, max_chars: int) -> Iterator[tuple[int, str]]:
        """What the model wrote at each evaluation: (step, text), a text that is longer cut."""
        step, text = None, ""
        with self._open_log(SAMPLES_FILE) as content, _as_text(content) as file:
            while line := file.readline(max_chars):
                if header := SAMPLE_HEADER.fullmatch(line):
                    if step is not None:
                        yield step, text.strip("\n")
                    step, text = int(header[1]), ""
                else:
                    text += line[: max(0, max_chars - len(text))]
        if step is not None:
            yield step, text.strip("\n")

    def truncate_after(self, step: int) -> bool:
        """Forget what was noted after a step; whether that step's own metrics are there. Where they
        are not, its sample goes too. Nothing is written before all was read.
        """
        records = {record["step"]: record for record in self.metrics() if record["step"] <= step}
        last = step if step in records else step - 1
        contents = {
            METRICS_FILE: "".join(json.dumps(record) + "\n" for record in records.values()),
            SAMPLES_FILE: "".join(self._read_samples_until(last)),
        }
        existing = [name for name in contents if files.exists(self.folder / name)]
        self.check_folder_exists()
        for name in existing:
            files.write_atomically(self.folder / name, contents[name])
        return step in records

    def sync_logs(self) -> None:
        """Make the disk hold what was noted."""
        for name in (METRICS_FILE, SAMPLES_FILE, HISTORY_FILE):
            with contextlib.suppress(FileNotFoundError):
                files.fsync_path(self.folder / name)
        files.fsync_path(self.folder)  # which holds their names

    def _append(self, name: str, text: str) -> None:
        self.check_folder_exists()
        path = self.folder / name
        with files.add_filename_to_errors(path), path.open("a+b") as file:
            # A full disk, or a kill, may have cut off the last line.
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                text = f"\n{text}"
            file.write(text.encode())

    @contextlib.contextmanager
    def _open_log(self, name: str) -> Iterator[IO[bytes]]:
        """A file of notes; an empty one where there is none."""
        path = self.folder / name
        try:
            file: IO[bytes] = path.open("rb")
        except FileNotFoundError:
            file = io.BytesIO()
        with files.add_filename_to_errors(path), file:
            yield file

    def _read_records(self, name: str) -> Iterator[dict[str, Any]]:
        with self._open_log(name) as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    record = files.parse_json(line.decode("utf-8"))
                    step = record.get("step") if isinstance(record, dict) else None
                    if isinstance(step, int) and 0 <= step <= MAX_INT:
                        yield record

    def _read_samples_until(self, step: int) -> Iterator[str]:
        lines: list[str] = []  # since the last empty one, as a kill may cut off a sample's head
        with self._open_log(SAMPLES_FILE) as content, _as_text(content) as file:
            for line in file:
                if (header := SAMPLE_HEADER.fullmatch(line)) and int(header[1]) > step:
                    return
                lines.append(line.replace("\0", ""))  # a file that lost its power may end with them
                if line == "\n":
                    yield from lines
                    lines = []


def _as_text(content: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(content, "utf-8", "replace", newline="")
