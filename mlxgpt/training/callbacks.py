"""Callbacks for the events of a training run, and the summary of a run."""

from __future__ import annotations

import shlex
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgpt.data.dataset import Dataset
from mlxgpt.data.example_array import ExampleArray
from mlxgpt.storage.run import Run
from mlxgpt.training.estimate import Estimate
from mlxgpt.training.patience import is_out_of_patience
from mlxgpt.training.selfcheck import CheckResult


@dataclass(frozen=True)
class TrainingSummary:
    """Summary of a training run.

    Attributes:
        run, data: folders of the run and of its data.
        step: steps taken; steps: steps planned.
        loss: training loss at the last logged step.
        loss_unit: unit of the losses.
        val_loss, best_step: best validation loss, and its step.
        seconds: training time since the start or resume, including evaluations and samples.
        interrupted: whether training was stopped before its end.
        out_of_patience: whether it ended early, since the validation loss no longer improved.
        resumed: whether an existing run was resumed (also True if it was already finished).
        try_it: command line that generates text from the run.
        warning: how the run differs from the request, if it does.
    """

    run: Path
    data: Path
    step: int
    steps: int
    loss: float | None
    loss_unit: str
    val_loss: float | None
    best_step: int | None
    seconds: float
    interrupted: bool
    resumed: bool
    try_it: str
    warning: str | None = None
    out_of_patience: bool = False

    @classmethod
    def from_run(
        cls, run: Run, dataset: Dataset, step: int, *, seconds: float = 0.0, resumed: bool = True
    ) -> TrainingSummary:
        """Summary of a run after `step` steps, from its logs."""
        last_record = deque(run.metrics(), maxlen=1)
        best = run.best()
        out_of_patience = step < run.config.train.max_steps and is_out_of_patience(run, run.config)
        command = ["mlxgpt", "generate", "--run", str(run.folder), _make_example_prompt(dataset)]
        if run.has_chat_template:
            command = ["mlxgpt", "chat", str(run.folder)]
        return cls(
            run=run.folder,
            data=dataset.folder,
            step=step,
            steps=run.config.train.max_steps,
            loss=last_record[0].get("loss") if last_record else None,
            loss_unit=run.config.loss_unit,
            val_loss=best["val_loss"] if best else None,
            best_step=best["step"] if best else None,
            seconds=seconds,
            interrupted=step < run.config.train.max_steps and not out_of_patience,
            resumed=resumed,
            try_it=shlex.join(command),
            out_of_patience=out_of_patience,
        )

    @classmethod
    def for_non_main_rank(cls, run: Path, data: Path, step: int, steps: int) -> TrainingSummary:
        """Summary on a non-main rank, which has no losses."""
        return cls(
            run=run,
            data=data,
            step=step,
            steps=steps,
            loss=None,
            loss_unit="",
            val_loss=None,
            best_step=None,
            seconds=0.0,
            interrupted=step < steps,
            resumed=False,
            try_it="",
        )


def _make_example_prompt(dataset: Dataset) -> str:
    """An example prompt: the start of the training data, without its end-of-text token."""
    train = dataset.train
    ids = train.prompt(0)[1:] if isinstance(train, ExampleArray) else train.ids
    line = dataset.tokenizer.decode(map(int, ids[:40])).strip().partition("\n")[0]
    return line if len(line) <= 30 else line[:30].rpartition(" ")[0] or line[:30]


class Callback:
    """Base class of callbacks: override the events of interest. An exception ends training."""

    def on_prepare(self, stage: str, done: int, total: int) -> None:
        """Progress of data preparation: `done` of about `total` bytes were read or tokenized."""

    def on_check(self, check: CheckResult) -> None:
        """A check of the self-check has finished."""

    def on_run(self, run: Run) -> None:
        """The run is about to be created or resumed; nothing has been written yet."""

    def on_train_begin(self, run: Run, dataset: Dataset, start: int, estimate: Estimate) -> None:
        """Training is about to begin after `start` steps (0 for a new run). Called again after each
        GPU failure.
        """

    def on_log(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl is ready; usually the next step is already running."""

    def on_sample(self, step: int, text: str) -> None:
        """The model has generated a sample at an evaluation."""

    def on_save(self, step: int, size: int, seconds: float) -> None:
        """A checkpoint of `size` bytes was written. Called from another thread."""

    def on_train_end(self, summary: TrainingSummary) -> None:
        """Training has ended, finished or interrupted."""


class CallbackList(Callback):
    """Combines callbacks: passes each event to all of them, in order."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._callbacks = list(callbacks)

    def on_prepare(self, stage: str, done: int, total: int) -> None:
        for callback in self._callbacks:
            callback.on_prepare(stage, done, total)

    def on_check(self, check: CheckResult) -> None:
        for callback in self._callbacks:
            callback.on_check(check)

    def on_run(self, run: Run) -> None:
        for callback in self._callbacks:
            callback.on_run(run)

    def on_train_begin(self, run: Run, dataset: Dataset, start: int, estimate: Estimate) -> None:
        for callback in self._callbacks:
            callback.on_train_begin(run, dataset, start, estimate)

    def on_log(self, record: dict[str, Any]) -> None:
        for callback in self._callbacks:
            callback.on_log(record)

    def on_sample(self, step: int, text: str) -> None:
        for callback in self._callbacks:
            callback.on_sample(step, text)

    def on_save(self, step: int, size: int, seconds: float) -> None:
        for callback in self._callbacks:
            callback.on_save(step, size, seconds)

    def on_train_end(self, summary: TrainingSummary) -> None:
        for callback in self._callbacks:
            callback.on_train_end(summary)
