"""What a training tells whoever looks on: while it goes on, and at its end."""

from __future__ import annotations

import shlex
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgpt.config import Config
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.storage.run import Run
from mlxgpt.training.forecast import Forecast
from mlxgpt.training.selfcheck import Check


@dataclass(frozen=True)
class Summary:
    """How a training ended.

    Attributes:
        run, data: their folders.
        step: updates done; steps: updates planned.
        loss: training loss of the last logged step, nats per token.
        val_loss: best validation loss, and the step it was reached at.
        seconds: of training in this session, evaluations and samples included.
        interrupted: whether it was stopped before its end.
        resumed: whether there was something to resume (True for a run that was finished already).
        try_it: the command line that generates from it.
        warning: what is not as it was asked for.
    """

    run: Path
    data: Path
    step: int
    steps: int
    loss: float | None
    val_loss: float | None
    best_step: int | None
    seconds: float
    interrupted: bool
    resumed: bool
    try_it: str
    warning: str | None = None

    @classmethod
    def of(
        cls,
        run: Run,
        config: Config,
        dataset: Dataset,
        *,
        step: int,
        seconds: float = 0.0,
        resumed: bool = True,
    ) -> Summary:
        """Of a run after so many steps, by what it noted."""
        last = deque(run.metrics(), maxlen=1)
        best = run.best()
        prompt = _first_words(dataset)
        return cls(
            run=run.folder,
            data=dataset.folder,
            step=step,
            steps=config.train.max_steps,
            loss=last[0].get("loss") if last else None,
            val_loss=best["val_loss"] if best else None,
            best_step=best["step"] if best else None,
            seconds=seconds,
            interrupted=step < config.train.max_steps,
            resumed=resumed,
            try_it=shlex.join(["mlxgpt", "generate", "--run", str(run.folder), prompt]),
        )

    @classmethod
    def of_follower(cls, run: Path, data: Path, step: int, steps: int) -> Summary:
        """What a rank knows that is not the first one."""
        none = dict.fromkeys(("loss", "val_loss", "best_step"))
        return cls(
            run, data, step, steps, **none, seconds=0.0, interrupted=step < steps, resumed=False,
            try_it="",
        )  # fmt: skip


def _first_words(dataset: Dataset) -> str:
    """The beginning of the training text, as a prompt to try."""
    ids = [int(i) for i in dataset.train.ids[:40]]
    first = dataset.tokenizer.decode(ids).strip().partition("\n")[0]
    return first if len(first) <= 30 else first[:30].rpartition(" ")[0] or first[:30]


class Callback:
    """Told of what happens in a training. Each method does nothing: override those of interest."""

    def on_note(self, line: str) -> None:
        """A line on what is being done."""

    def on_warning(self, line: str) -> None:
        """Something is not as it was asked for."""

    def on_prepare(self, doing: str, done: int, total: int) -> None:
        """So many of about `total` bytes of text are read, or encoded."""

    def on_check(self, check: Check) -> None:
        """A result of the self-check."""

    def on_run(self, run: Run) -> None:
        """The run is about to be created, or resumed; nothing of it is written yet. A UserError
        that is raised here ends it.
        """

    def on_train_begin(self, run: Run, dataset: Dataset, start: int, forecast: Forecast) -> None:
        """The first step, `start` if the run is resumed, is about to be taken; again after each
        failure of the GPU.
        """

    def on_log(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl was written; by then the next step was handed over."""

    def on_sample(self, step: int, text: str) -> None:
        """What the model writes by now."""

    def on_save(self, step: int, size: int, seconds: float) -> None:
        """A checkpoint of so many bytes was written; told from another thread."""

    def on_train_end(self, summary: Summary) -> None:
        """The training has ended, one way or the other."""
