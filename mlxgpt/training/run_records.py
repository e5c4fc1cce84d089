"""A run's own records, written by the main rank: checkpoints, metrics, samples, snapshots."""

from __future__ import annotations

import contextlib
import logging
import math
from types import TracebackType
from typing import Any

from mlxgpt.config import Sampling
from mlxgpt.data.dataset import Dataset
from mlxgpt.evaluation.loss import Evaluation
from mlxgpt.inference.engine import CompiledModel, NotFiniteError
from mlxgpt.inference.generate import generate
from mlxgpt.storage.run import Run
from mlxgpt.training.callbacks import Callback, CallbackList
from mlxgpt.training.checkpointer import AsyncCheckpointer, is_regular
from mlxgpt.training.metrics import StepMetrics
from mlxgpt.training.snapshots import Snapshots
from mlxgpt.training.spike_guard import SpikeGuard
from mlxgpt.training.step import TrainStep
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


class RunRecords(Callback):
    """Writes metrics.jsonl and samples.txt. A line of metrics is logged after the next step was
    handed over, so one that cannot be written is kept until training has stopped and is saved.

    Attributes:
        error: why a line could not be written at once.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._unwritten: list[dict[str, Any]] = []
        self.error: OSError | None = None

    def on_log(self, record: dict[str, Any]) -> None:
        self._unwritten.append(record)
        try:
            self.flush()
        except OSError as error:
            self.error = self.error or error

    def on_sample(self, step: int, text: str) -> None:
        self._run.add_sample(step, text)

    def flush(self) -> None:
        """Write the lines that are not written yet; raises OSError."""
        if self.error:  # a line may be written although an error was reported, as of closing a file
            written = {record["step"] for record in self._run.metrics()}
            self._unwritten = [line for line in self._unwritten if line["step"] not in written]
        while self._unwritten:
            self._run.log(self._unwritten[0])
            self._unwritten.pop(0)


class RunWriter:
    """What the main rank writes during a training run. A context: at its end all is written.

    Args:
        callbacks: get the events after the run's own records.
    """

    def __init__(
        self, run: Run, dataset: Dataset, step_function: TrainStep, callbacks: Callback
    ) -> None:
        self.run, self._step_function = run, step_function
        self._tokenizer = dataset.tokenizer
        self._records = RunRecords(run)
        self._callbacks = CallbackList([self._records, callbacks])
        keep = run.config.train.keep_checkpoints
        self._checkpointer = AsyncCheckpointer(run, keep, callbacks.on_save)
        self._snapshots = Snapshots(run, step_function, self._checkpointer.submit)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._checkpointer.close(kind)

    def has_failed(self) -> bool:
        """Whether something could not be written, so that training has to stop."""
        return self._checkpointer.has_failed() or self._records.error is not None

    def save(self, step: int, metrics: StepMetrics | None, guard: SpikeGuard) -> None:
        """Start to write a checkpoint of the weights as they are."""
        numbers = metrics.to_tree() if metrics else {}
        self._checkpointer.save(step, self._step_function, numbers, guard.to_tree())

    def snapshot(self, step: int) -> None:
        """Start to write a snapshot of the weights as they are."""
        self._snapshots.take(step)

    def add_evaluation(self, metrics: StepMetrics, sample: Evaluation, result: Evaluation) -> None:
        """Record an evaluation: name the best checkpoint, generate a sample. Raises OSError if that
        cannot be written, as on a full disk.

        Args:
            sample: on the tokens that every evaluation reads; result: to be reported.
        """
        metrics.values["val_loss"] = result.loss
        metrics.values["val_bits_per_byte"] = result.bits_per_byte
        metrics.values["val_tokens"] = result.tokens
        best = self.run.best()
        if math.isfinite(sample.loss) and (best is None or sample.loss < best["val_loss"]):
            self._checkpointer.wait()  # the best checkpoint must exist before it is named
            self.run.set_best(metrics.step, result.loss)
        self._generate_sample(metrics.step)

    def log(self, record: dict[str, Any]) -> None:
        """Log a line of metrics. If it cannot be written at a step that was saved, training stops:
        resuming logs it again.
        """
        self._callbacks.on_log(record)
        if self._records.error and is_regular(self.run.config, record["step"]):
            raise self.stopped(self._records.error, record["step"])

    def regular_steps(self) -> list[int]:
        """Steps of the checkpoints that would exist also if training had never been stopped, so
        that a rollback does not depend on that; once the last one is written.
        """
        self._checkpointer.wait()
        return [step for step in self.run.steps() if is_regular(self.run.config, step)]

    def finish(self, step: int, guard: SpikeGuard) -> None:
        """After the last step: save it, and write what could not be written before.

        Raises:
            UserError: if training had to stop for lines of metrics that could not be written.
        """
        self._checkpointer.wait()
        if step not in self.run.steps():
            self.save(step, None, guard)
            self._checkpointer.wait()
        if error := self._records.error:
            with contextlib.suppress(OSError):
                self._records.flush()
            raise self.stopped(error, step)
        self.run.sync_notes()

    def _generate_sample(self, step: int) -> None:
        t = self.run.config.train
        if not t.sample_tokens:
            return
        sampling = Sampling(max_tokens=t.sample_tokens, seed=t.seed)
        # Traced again each time, as the weights are part of the trace.
        compiled = CompiledModel(self._step_function.model, self._tokenizer.vocab_size)
        try:
            generated = generate(compiled, self._tokenizer, [""], sampling, bos=self.run.bos)
        except NotFiniteError as error:  # what to do about it is the guard's decision
            logger.info("no sample: %s", error.problem)
            return
        self._callbacks.on_sample(step, generated.texts[0])

    def stopped(self, error: OSError, step: int) -> UserError:
        """The error with which training stops, saved, after a file could not be read or written."""
        self._checkpointer.wait()
        problem = files.os_error(error, "read or write", self.run.folder)
        return UserError(f"{problem.problem}; stopped and saved at step {step:,}", problem.remedy)
