"""Callbacks that log a training run's metrics to TensorBoard or Weights & Biases."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import secrets
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any, Self

from mlxgpt.data.dataset import Dataset
from mlxgpt.storage.run import Run
from mlxgpt.training.callbacks import Callback, TrainingSummary
from mlxgpt.training.estimate import Estimate
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


INSTALL_COMMANDS = {
    "tensorboard": "pip install 'tensorboard>=2.19,<3'",
    "wandb": "pip install 'wandb>=0.19,<1'",
}
CLOSE_SECONDS = 60.0  # timeout for writing or sending the rest at the end
THREAD_NAME = "metrics-logger"  # repeated in cli/main.py, which must not import this
CallQueue = SimpleQueue[Callable[[], object] | None]


class MetricsLogger(Callback, ABC):
    """Base class of callbacks that log each record of metrics.jsonl to an experiment tracker, in a
    background thread. If the tracker fails during training, it warns once, and training continues
    without it. Use it as a context manager; at exit it waits until everything is written.

    Args:
        name: name of the tracker's package.

    Raises:
        UserError: if the package is not installed or cannot be imported.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        spec = find_spec(name)
        if not spec or not spec.origin:  # for a mere folder of that name, origin is None
            raise UserError(f"{name} is not installed", f"install it: {INSTALL_COMMANDS[name]}.")
        try:
            self._import()
        except ImportError as error:
            raise UserError(
                f"{name} cannot be imported: {error}",
                f"reinstall it: {INSTALL_COMMANDS[name]}.",
            ) from error
        self._queue = CallQueue()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_run(self, run: Run) -> None:
        self._connect(run)
        self._queue = CallQueue()
        self._thread = threading.Thread(
            target=self._process_queue, args=(self._queue,), name=THREAD_NAME, daemon=True
        )
        self._thread.start()

    def on_train_begin(self, run: Run, dataset: Dataset, start: int, estimate: Estimate) -> None:
        first_step = start + run.has_metrics(start)
        self._queue.put(lambda: self._start(run, first_step))

    def on_log(self, record: dict[str, Any]) -> None:
        metrics = {name: value for name, value in record.items() if name != "step"}
        finite_metrics = {
            n: float(v) for n, v in metrics.items() if v is not None and math.isfinite(v)
        }
        self._queue.put(lambda: self._write(record["step"], finite_metrics))

    def on_train_end(self, summary: TrainingSummary) -> None:
        self._queue.put(None)

    def close(self) -> None:
        """Wait until everything is written or sent. Ctrl-C ends the wait."""
        if not self._thread:
            return
        self._queue.put(None)
        with contextlib.suppress(KeyboardInterrupt):
            self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning(
                "%s did not finish in time; some metrics may be missing there", self._name
            )

    def _process_queue(self, queue: CallQueue) -> None:
        """Thread body: run the queued calls until None arrives, then finish."""
        try:
            while call := queue.get():
                call()
        except Exception as error:  # the tracker's library may raise anything
            self._warn(error)
            with contextlib.suppress(Exception):
                self._finish()
            return
        try:
            self._finish()
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        logger.warning(
            "%s failed: %s; training continues without it", self._name, _format_error(error)
        )

    # Implemented for each tracker; these may raise any exception of its library.

    @abstractmethod
    def _import(self) -> None:
        """Import the tracker's package; raises ImportError, or UserError if it cannot be used."""

    def _connect(self, run: Run) -> None:
        """Connect before a new run is created on disk; raises UserError."""

    @abstractmethod
    def _start(self, run: Run, step: int) -> None:
        """Start writing. Discards metrics from `step` on that a killed process has written."""

    @abstractmethod
    def _write(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step."""

    @abstractmethod
    def _finish(self) -> None:
        """Write or send the rest, and close."""


class TensorBoardLogger(MetricsLogger):
    """Writes event files to the run's folder: `tensorboard --logdir runs` shows all runs."""

    def __init__(self) -> None:
        super().__init__("tensorboard")
        self._writer: Any = None
        self._last_step = 0

    def _import(self) -> None:
        self._event_pb2: Any = import_module("tensorboard.compat.proto.event_pb2")
        self._summary_pb2: Any = import_module("tensorboard.compat.proto.summary_pb2")
        # EventFileWriter's own thread would print a traceback if the disk is full.
        self._record_writer: Any = import_module("tensorboard.summary.writer.record_writer")

    def _start(self, run: Run, step: int) -> None:
        self._finish()
        folder = run.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}"
        self._writer = self._record_writer.RecordWriter((folder / name).open("ab"))
        self._add_event(0, file_version="brain.Event:2")
        self._purge_from_step(step)  # TensorBoard ignores the first one in a folder
        self._purge_from_step(step)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        if step <= self._last_step:  # training was rolled back
            self._purge_from_step(step)
        self._last_step = step
        make_scalar = self._summary_pb2.Summary.Value
        scalars = [make_scalar(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add_event(step, summary=self._summary_pb2.Summary(value=scalars))
        self._writer.flush()  # so that a killed run has what metrics.jsonl has

    def _finish(self) -> None:
        if self._writer:
            self._writer.close()

    def _purge_from_step(self, step: int) -> None:
        """Make TensorBoard discard everything from `step` on."""
        log = self._event_pb2.SessionLog
        self._add_event(step, session_log=log(status=log.START))

    def _add_event(self, step: int, **content: Any) -> None:
        event = self._event_pb2.Event(wall_time=time.time(), step=step, **content)
        self._writer.write(event.SerializeToString())


WANDB_INIT_SECONDS = 20.0  # timeout; wandb.init takes about 10 s longer to give up
WANDB_TOKEN_FILE = "wandb.txt"  # in the run folder: a random token that makes the wandb id unique


class WandbLogger(MetricsLogger):
    """Logs to the wandb project `mlxgpt`; a resumed run continues its wandb run. Where metrics are
    sent is configured in wandb: WANDB_MODE=offline, `wandb login`.

    Raises:
        UserError: if wandb is not logged in.
    """

    def __init__(self) -> None:
        self._run: Any = None
        super().__init__("wandb")

    def _import(self) -> None:
        self._wandb: Any = import_module("wandb")
        with _convert_wandb_errors():
            self._require_login()

    def _require_login(self) -> None:
        """Raise UserError if not logged in; in a terminal wandb.init would prompt for a login."""
        if self._wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
            return
        try:
            logged_in = self._wandb.login(prompt=False, verify=False)
        except TypeError:  # older versions have no `prompt`
            logged_in = self._wandb.api.api_key is not None
        if not logged_in:
            raise UserError(
                "wandb is not logged in",
                "run `wandb login`, or set WANDB_MODE=offline and run `wandb sync` later.",
            )

    def _connect(self, run: Run) -> None:
        first_record = next(run.history(), {})
        self._token = str(first_record.get("time") or secrets.token_hex(8))
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._token = files.read_small(run.folder / WANDB_TOKEN_FILE)
        has_timeout = "WANDB_INIT_TIMEOUT" in os.environ
        settings = {} if has_timeout else {"init_timeout": WANDB_INIT_SECONDS}
        with _convert_wandb_errors():
            self._run = self._wandb.init(
                project="mlxgpt",
                name=run.name,
                id=hashlib.sha256(f"{run.name} {self._token}".encode()).hexdigest()[:16],
                resume="allow",
                config=asdict(run.config),
                settings=self._wandb.Settings(**settings),
            )

    def _start(self, run: Run, step: int) -> None:
        (run.folder / WANDB_TOKEN_FILE).write_text(self._token)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def _finish(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[], MetricsLogger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}


def make_logger(name: str) -> MetricsLogger:
    """Create the logger for `--report-to NAME`.

    Raises:
        UserError: if the name is unknown, or the tracker cannot be used.
    """
    if name not in LOGGERS:
        raise UserError(f"unknown logger {name}", f"use {' or '.join(LOGGERS)}.")
    return LOGGERS[name]()


@contextlib.contextmanager
def _convert_wandb_errors() -> Iterator[None]:
    """Convert errors of wandb's setup to UserError: wandb's own, pydantic's and the network's."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"wandb failed: {_format_error(error)}",
            "check the network connection and `wandb login`, or set WANDB_MODE=offline and run "
            "`wandb sync` later.",
        ) from error


def _format_error(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
