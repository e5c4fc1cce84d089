"""Logs in a run's folder. Truncated or damaged lines are skipped. A missing file counts as empty;
an unreadable one raises OSError.

    metrics.jsonl    one object per logged step
    history.jsonl    one object each time training starts or resumes: step, time, environment,
                     changed settings, estimate; and one per rollback after a loss spike
    samples.txt      text generated at each evaluation
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

from mlxgpt.config.fields import MAX_INT
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError

RUN_FILE = "run.json"
METRICS_FILE, SAMPLES_FILE, HISTORY_FILE = "metrics.jsonl", "samples.txt", "history.jsonl"
SAMPLE_HEADER = re.compile(r"--- step (\d{1,18})\n", re.ASCII)


@dataclass(frozen=True)
class RunLogs:
    """The logs in one run's folder. Their contents are not trusted.

    Attributes:
        folder_fd: file descriptor of the folder during training; see `hold_run_folder`.
    """

    folder: Path
    folder_fd: int | None = field(default=None, kw_only=True, compare=False)

    def check_folder_exists(self) -> None:
        """Check before each write during training that the run's folder is still there, so that a
        deleted run is not created again and another run is not overwritten.

        Raises:
            UserError: if the folder was deleted, moved or replaced.
        """
        if self.folder_fd is None:
            return
        if not files.is_same_file(self.folder_fd, self.folder) or not files.exists(
            self.folder / RUN_FILE
        ):
            raise UserError(
                f"the run folder {self.folder} no longer exists: training stopped",
                "if the run was moved, resume it from its new folder: --run FOLDER.",
            )

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record to the metrics."""
        self._append(METRICS_FILE, json.dumps(record) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the records of the metrics, each with its step."""
        return self._read_records(METRICS_FILE)

    def has_metrics(self, step: int) -> bool:
        """Whether metrics were logged for a step."""
        return any(record["step"] == step for record in self.metrics())

    def log_session_start(
        self,
        step: int,
        environment: Mapping[str, str],
        changed: Mapping[str, tuple[Any, Any]],
        estimate: Mapping[str, float | None],
    ) -> None:
        """Append to the history that training starts or resumes at a step.

        Args:
            changed: settings that changed, name -> (old, new).
            estimate: estimated duration, memory and validation loss; see training/estimate.py.
        """
        session = {"on": dict(environment), "changed": dict(changed), "forecast": dict(estimate)}
        self._append_history(step, session)

    def log_rollback(self, step: int, spike_step: int) -> None:
        """Append to the history that training rolled back to a step after a loss spike."""
        self._append_history(step, {"spiked": spike_step})

    def _append_history(self, step: int, extra: Mapping[str, Any]) -> None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        self._append(HISTORY_FILE, json.dumps({"step": step, "time": time, **extra}) + "\n")

    def history(self) -> Iterator[dict[str, Any]]:
        """Yield the records of the history, each with its step."""
        return self._read_records(HISTORY_FILE)

    def last_environment(self) -> dict[str, str]:
        """Environment of the last training session; {} if unknown."""
        environments = deque((line["on"] for line in self.history() if "on" in line), maxlen=1)
        environment = environments[0] if environments else None
        if not isinstance(environment, dict):
            return {}
        return {str(name): str(value) for name, value in environment.items()}

    def add_sample(self, step: int, text: str) -> None:
        """Append the text generated at a step."""
        self._append(SAMPLES_FILE, f"--- step {step}\n{text}\n\n")

    def samples(self, max_chars: int) -> Iterator[tuple[int, str]]:
        """Yield (step, text) of the samples, with each text cut at `max_chars`."""
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
        """Delete metrics and samples after a step, and return whether that step has metrics. If
        not, its sample is deleted, too. Nothing is written before everything has been read.
        """
        records = {record["step"]: record for record in self.metrics() if record["step"] <= step}
        last_sample_step = step if step in records else step - 1
        contents = {
            METRICS_FILE: "".join(json.dumps(record) + "\n" for record in records.values()),
            SAMPLES_FILE: "".join(self._read_samples_until(last_sample_step)),
        }
        existing = [name for name in contents if files.exists(self.folder / name)]
        self.check_folder_exists()
        for name in existing:
            files.write_atomically(self.folder / name, contents[name])
        return step in records

    def sync_logs(self) -> None:
        """Sync the logs to disk."""
        for name in (METRICS_FILE, SAMPLES_FILE, HISTORY_FILE):
            with contextlib.suppress(FileNotFoundError):
                files.fsync_path(self.folder / name)
        files.fsync_path(self.folder)  # stores the file names

    def _append(self, name: str, text: str) -> None:
        self.check_folder_exists()
        path = self.folder / name
        with files.add_filename_to_errors(path), path.open("a+b") as file:
            # A full disk or a kill may have truncated the last line.
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                text = f"\n{text}"
            file.write(text.encode())

    @contextlib.contextmanager
    def _open_log(self, name: str) -> Iterator[IO[bytes]]:
        """Open a log file; a missing one reads as empty."""
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
                    record = json_files.parse_json(line.decode("utf-8"))
                    step = record.get("step") if isinstance(record, dict) else None
                    if isinstance(step, int) and 0 <= step <= MAX_INT:
                        yield record

    def _read_samples_until(self, step: int) -> Iterator[str]:
        lines: list[str] = []  # since the last empty line; an incomplete last sample is dropped
        with self._open_log(SAMPLES_FILE) as content, _as_text(content) as file:
            for line in file:
                if (header := SAMPLE_HEADER.fullmatch(line)) and int(header[1]) > step:
                    return
                lines.append(line.replace("\0", ""))  # a power loss may append NULs
                if line == "\n":
                    yield from lines
                    lines = []


def _as_text(content: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(content, "utf-8", "replace", newline="")
