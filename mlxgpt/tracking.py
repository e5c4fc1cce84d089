"""Metrics of a training run for TensorBoard or Weights & Biases."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any, Protocol

from mlxgpt import files
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.errors import UserError
from mlxgpt.storage.run import Run
from mlxgpt.training.callback import Callback, Summary
from mlxgpt.training.forecast import Forecast
from mlxgpt.training.selfcheck import Check

INSTALL = {
    "tensorboard": "pip install 'tensorboard>=2.19,<3'",
    "wandb": "pip install 'wandb>=0.19,<1'",
}
INIT_SECONDS = 20.0  # of wandb.init, which takes about ten more to give up
CLOSE_SECONDS = 60.0  # for what is still to be written or sent at the end
THREAD = "tracker"  # cli.py knows it, too
TOKEN = "wandb.txt"  # in the run's folder: random, part of its id at wandb


class Backend(Protocol):
    """A tracker. Every method may raise whatever the tracker's library raises."""

    def connect(self, run: Run) -> None:
        """Connect, before anything of a new run is written; raises UserError."""

    def begin(self, run: Run, step: int) -> None:
        """Begin to write. Metrics of `step` and later steps, from before a kill, do not count."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of a step."""

    def close(self) -> None:
        """Write or send the rest."""


class Tracker(Callback):
    """Sends the records of metrics.jsonl to a tracker as well, from a thread of its own. Where the
    tracker fails after the start, it warns once, and the training continues without it.

    Args:
        to: `tensorboard` or `wandb`.
        callback: receives all events, too.

    Raises:
        UserError: if the tracker is not installed, or nobody is logged in, before any training.
    """

    def __init__(self, to: str, callback: Callback) -> None:
        if to not in INSTALL:
            raise UserError(f"there is no tracker {to}", f"use {' or '.join(INSTALL)}.")
        spec = find_spec(to)
        if not spec or not spec.origin:  # a folder of that name is a package without origin
            raise UserError(f"{to} is not installed", f"get it: {INSTALL[to]}.")
        self._to, self._callback = to, callback
        try:
            self._backend: Backend = _TensorBoard() if to == "tensorboard" else _Wandb()
        except ImportError as error:
            raise UserError(
                f"{to} cannot be imported: {error}", f"install it again: {INSTALL[to]}."
            ) from error
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """Write what is still to be written, also after an error. Ctrl-C ends the wait."""
        if not self._thread:
            return
        self._calls.put(None)
        with contextlib.suppress(KeyboardInterrupt):
            self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            line = f"{self._to} did not finish, and is not waited for; metrics may be missing there"
            self._callback.on_warning(line)

    def on_run(self, run: Run) -> None:
        self._backend.connect(run)
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
        self._thread.start()
        self._callback.on_run(run)

    def on_train_begin(self, run: Run, dataset: Dataset, start: int, forecast: Forecast) -> None:
        first = start + run.noted(start)
        self._calls.put(lambda: self._backend.begin(run, first))
        self._callback.on_train_begin(run, dataset, start, forecast)

    def on_log(self, record: dict[str, Any]) -> None:
        numbers = {name: value for name, value in record.items() if name != "step"}
        known = {n: float(v) for n, v in numbers.items() if v is not None and math.isfinite(v)}
        self._calls.put(lambda: self._backend.write(record["step"], known))
        self._callback.on_log(record)

    def _work(self) -> None:
        try:
            while call := self._calls.get():
                call()
        except Exception as error:  # whatever the library raises
            self._warn(error)
            with contextlib.suppress(Exception):
                self._backend.close()
            return
        try:
            self._backend.close()
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        line = f"{self._to} failed: {_one_line(error)}; the training continues without it"
        self._callback.on_warning(line)

    def on_note(self, line: str) -> None:
        self._callback.on_note(line)

    def on_warning(self, line: str) -> None:
        self._callback.on_warning(line)

    def on_prepare(self, doing: str, done: int, total: int) -> None:
        self._callback.on_prepare(doing, done, total)

    def on_check(self, check: Check) -> None:
        self._callback.on_check(check)

    def on_sample(self, step: int, text: str) -> None:
        self._callback.on_sample(step, text)

    def on_save(self, step: int, size: int, seconds: float) -> None:
        self._callback.on_save(step, size, seconds)

    def on_train_end(self, summary: Summary) -> None:
        self._callback.on_train_end(summary)


class _TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs` shows all runs."""

    def __init__(self) -> None:
        self._event: Any = import_module("tensorboard.compat.proto.event_pb2")
        self._summary: Any = import_module("tensorboard.compat.proto.summary_pb2")
        # Not its EventFileWriter, whose own thread prints a traceback where the disk is full.
        self._records: Any = import_module("tensorboard.summary.writer.record_writer")
        self._writer: Any = None
        self._last = 0

    def connect(self, run: Run) -> None:
        """There is nothing to connect to."""

    def begin(self, run: Run, step: int) -> None:
        self.close()
        folder = run.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}"
        self._writer = self._records.RecordWriter((folder / name).open("ab"))
        self._add(0, file_version="brain.Event:2")
        self._restart(step)  # the first one of a folder is ignored by TensorBoard
        self._restart(step)

    def write(self, step: int, values: dict[str, float]) -> None:
        if step <= self._last:  # the training went back after a loss spike
            self._restart(step)
        self._last = step
        kind = self._summary.Summary.Value
        scalars = [kind(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, summary=self._summary.Summary(value=scalars))
        self._writer.flush()  # so that a killed run has what metrics.jsonl has

    def close(self) -> None:
        if self._writer:
            self._writer.close()

    def _restart(self, step: int) -> None:
        """Let TensorBoard forget everything from `step` on."""
        log = self._event.SessionLog
        self._add(step, session_log=log(status=log.START))

    def _add(self, step: int, **content: Any) -> None:
        event = self._event.Event(wall_time=time.time(), step=step, **content)
        self._writer.write(event.SerializeToString())


class _Wandb:
    """A run of wandb's project `mlxgpt`; a resumed run continues there. Whether and where to it is
    sent is wandb's own setting: WANDB_MODE=offline, `wandb login`.
    """

    def __init__(self) -> None:
        self._wandb: Any = import_module("wandb")
        self._run: Any = None
        with _refused():
            self._must_be_logged_in()

    def _must_be_logged_in(self) -> None:
        """Without a prompt, which wandb.init would show in a terminal."""
        if self._wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
            return
        try:
            logged_in = self._wandb.login(prompt=False, verify=False)
        except TypeError:  # older versions have no `prompt`
            logged_in = self._wandb.api.api_key is not None
        if not logged_in:
            raise UserError(
                "wandb is not logged in",
                "run `wandb login`; or set WANDB_MODE=offline, and run `wandb sync` later.",
            )

    def connect(self, run: Run) -> None:
        begun = next(run.history(), {})
        self._token = str(begun.get("time") or secrets.token_hex(8))
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._token = files.read_small(run.folder / TOKEN)
        settings = {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": INIT_SECONDS}
        with _refused():
            self._run = self._wandb.init(
                project="mlxgpt",
                name=run.name,
                id=hashlib.sha256(f"{run.name} {self._token}".encode()).hexdigest()[:16],
                resume="allow",
                config=asdict(run.config),
                settings=self._wandb.Settings(**settings),
            )

    def begin(self, run: Run, step: int) -> None:
        (run.folder / TOKEN).write_text(self._token)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Turn wandb's errors at the start into one of ours: its own, pydantic's, the network's."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"wandb failed: {_one_line(error)}",
            "check the connection and `wandb login`; or set WANDB_MODE=offline, and run `wandb "
            "sync` later.",
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
