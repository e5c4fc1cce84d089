"""A training's records for TensorBoard or Weights & Biases, for those who look at theirs there."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from mlxgpt.corpus.dataset import Dataset
from mlxgpt.errors import UserError
from mlxgpt.storage.run import Run
from mlxgpt.training.callback import Callback, Summary
from mlxgpt.training.forecast import Forecast
from mlxgpt.training.selfcheck import Check

GET = {
    "tensorboard": "pip install 'tensorboard>=2.19,<3'",
    "wandb": "pip install 'wandb>=0.19,<1'",
}
Write = Callable[[int, dict[str, float]], None]  # a step and its numbers, by name


class Tracker(Callback):
    """Passes on what it is told, and the records to a tracker, too. The same records as in
    metrics.jsonl; the trainer knows nothing of it.

    Args:
        to: `tensorboard` or `wandb`.
        callback: what else is told.

    Raises:
        UserError: if that is not installed, before anything is trained.
    """

    def __init__(self, to: str, callback: Callback) -> None:
        if to not in GET:
            raise UserError(f"there is no tracker {to}", f"use {' or '.join(GET)}.")
        if not find_spec(to):
            raise UserError(f"{to} is not installed", f"get it: {GET[to]}.")
        self._to, self._callback = to, callback
        self._write: Write = lambda step, numbers: None
        self._close: Callable[[], object] = lambda: None

    def close(self) -> None:
        """Write what is still to be written; also after an error."""
        self._close()

    def on_train_begin(self, run: Run, dataset: Dataset, start: int, forecast: Forecast) -> None:
        begin = _tensorboard if self._to == "tensorboard" else _wandb
        self._write, self._close = begin(run)
        self._callback.on_train_begin(run, dataset, start, forecast)

    def on_log(self, record: dict[str, Any]) -> None:
        numbers = {name: value for name, value in record.items() if name != "step"}
        known = {n: float(v) for n, v in numbers.items() if v is not None and math.isfinite(v)}
        self._write(record["step"], known)
        self._callback.on_log(record)

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


def _tensorboard(run: Run) -> tuple[Write, Callable[[], object]]:
    """Event files in the run's folder: `tensorboard --logdir runs` shows all runs."""
    from tensorboard.summary import Writer

    writer = Writer(str(run.folder / "tensorboard"))

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _wandb(run: Run) -> tuple[Write, Callable[[], object]]:
    """A run of the project `mlxgpt`; one that is resumed here goes on there. Whether it is sent,
    and where to, is wandb's own affair: WANDB_MODE=offline, `wandb login`.
    """
    import wandb

    begun = next(run.history(), {})
    identity = hashlib.sha256(f"{run.name} {begun.get('time')}".encode()).hexdigest()[:16]
    tracked = wandb.init(
        project="mlxgpt", name=run.name, id=identity, resume="allow", config=asdict(run.config)
    )
    return lambda step, numbers: tracked.log(numbers, step=step), tracked.finish
