"""Write a run's checkpoints, metrics, samples and snapshots, on the main rank."""

from __future__ import annotations

import contextlib
import logging
import math
from types import TracebackType
from typing import Any

import numpy as np

from mlxgpt.config import SamplingParams
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.example_array import ExampleArray
from mlxgpt.evaluation.loss import Evaluation
from mlxgpt.inference.engine import CompiledModel, NotFiniteError
from mlxgpt.inference.generate import prepend_bos, stream_tokens
from mlxgpt.storage.run import Run
from mlxgpt.training.callbacks import Callback, CallbackList
from mlxgpt.training.checkpointer import AsyncCheckpointer, is_scheduled_checkpoint
from mlxgpt.training.metrics import StepMetrics
from mlxgpt.training.patience import is_out_of_patience
from mlxgpt.training.snapshots import SnapshotWriter
from mlxgpt.training.spike_guard import SpikeGuard
from mlxgpt.training.step import TrainStep
from mlxgpt.training.validation import Result
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


class RunLogWriter(Callback):
    """Writes metrics.jsonl and samples.txt. A step is logged while the next one is already running,
    so a record that cannot be written is kept until training has stopped and been saved.

    Attributes:
        error: the first error of writing a record, or None.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pending_records: list[dict[str, Any]] = []
        self.error: OSError | None = None

    def on_log(self, record: dict[str, Any]) -> None:
        self._pending_records.append(record)
        try:
            self.flush()
        except OSError as error:
            self.error = self.error or error

    def on_sample(self, step: int, text: str) -> None:
        self._run.add_sample(step, text)

    def flush(self) -> None:
        """Write all pending records; raises OSError."""
        if self.error:  # a record may have been written despite an error, such as one on close
            written_steps = {record["step"] for record in self._run.metrics()}
            self._pending_records = [
                record for record in self._pending_records if record["step"] not in written_steps
            ]
        while self._pending_records:
            self._run.log(self._pending_records[0])
            self._pending_records.pop(0)


class RunWriter:
    """Writes a run's records during training, on the main rank. Use it as a context manager; at
    exit it waits until everything is written.

    Args:
        callbacks: get each event after the run's own records are written.

    Attributes:
        is_out_of_patience: whether the validation loss has not improved for too long.
    """

    def __init__(
        self, run: Run, dataset: Dataset, step_function: TrainStep, callbacks: Callback
    ) -> None:
        self.run, self._step_function = run, step_function
        self._tokenizer, self._val = dataset.tokenizer, dataset.val
        self._log_writer = RunLogWriter(run)
        self._callbacks = CallbackList([self._log_writer, callbacks])
        keep = run.config.train.keep_checkpoints
        self._checkpointer = AsyncCheckpointer(run, keep, callbacks.on_save)
        self._snapshot_writer = SnapshotWriter(run, step_function, self._checkpointer.submit)
        self.is_out_of_patience = is_out_of_patience(run, run.config)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._checkpointer.close(exc_type)

    def has_failed(self) -> bool:
        """Whether a write has failed, so that training must stop."""
        return self._checkpointer.has_failed() or self._log_writer.error is not None

    def save(self, step: int, metrics: StepMetrics | None, guard: SpikeGuard) -> None:
        """Start writing a checkpoint of the current weights."""
        tree = metrics.to_tree() if metrics else {}
        self._checkpointer.save(step, self._step_function, tree, guard.to_tree())

    def save_snapshot(self, step: int) -> None:
        """Start writing a snapshot of the current weights."""
        self._snapshot_writer.take(step)

    def add_evaluation(
        self,
        metrics: StepMetrics,
        subset_result: Result,
        result: Result,
        base_result: Evaluation | None,
    ) -> None:
        """Record an evaluation: update the best checkpoint and generate a sample. Raises OSError if
        that cannot be written, as on a full disk.

        Args:
            subset_result: result on the tokens that every evaluation uses; decides which is best.
            result: result to report.
            base_result: result on the data of the run that the initial weights are from, if any.
        """
        metrics.eval_metrics |= result.to_metrics()
        if base_result:
            metrics.eval_metrics["base_val_loss"] = base_result.loss
        best = self.run.best()
        if math.isfinite(subset_result.loss) and (
            best is None or subset_result.loss < best["val_loss"]
        ):
            self._checkpointer.wait()  # the checkpoint must exist before it is recorded as best
            self.run.set_best(metrics.step, result.loss)
        self._generate_sample(metrics.step)

    def log(self, record: dict[str, Any]) -> None:
        """Log a record of metrics. If that fails at a step with a scheduled checkpoint, training
        stops; resuming logs it again.
        """
        self._callbacks.on_log(record)
        if "val_loss" in record:
            self.is_out_of_patience = is_out_of_patience(self.run, self.run.config)
        if self._log_writer.error and is_scheduled_checkpoint(self.run.config, record["step"]):
            raise self.make_stop_error(self._log_writer.error, record["step"])

    def scheduled_checkpoint_steps(self) -> list[int]:
        """Steps of the scheduled checkpoints, once the pending one is written. Others exist only
        because training was stopped, and a rollback must not depend on that.
        """
        self._checkpointer.wait()
        return [step for step in self.run.steps() if is_scheduled_checkpoint(self.run.config, step)]

    def finish(self, step: int, guard: SpikeGuard) -> None:
        """After the last step: save it, and write the pending records.

        Raises:
            UserError: if training had to stop because metrics could not be written.
        """
        self._checkpointer.wait()
        if step not in self.run.steps():
            self.save(step, None, guard)
            self._checkpointer.wait()
        if error := self._log_writer.error:
            with contextlib.suppress(OSError):
                self._log_writer.flush()
            raise self.make_stop_error(error, step)
        self.run.sync_logs()

    def _generate_sample(self, step: int) -> None:
        t = self.run.config.train
        if not t.sample_tokens:
            return
        sampling = SamplingParams(max_tokens=t.sample_tokens, seed=t.seed)
        ids, text = prepend_bos(np.array([], dtype=np.int64), self._tokenizer, self.run.bos), ""
        if isinstance(self._val, ExampleArray):
            ids = self._val.prompt(0)
            text = self._tokenizer.decode(ids.tolist())
        # Compiled again each time, since the weights are constants of the trace.
        model = CompiledModel(self._step_function.model, self._tokenizer.vocab_size)
        try:
            for output in stream_tokens(model, self._tokenizer, ids, sampling):
                text += output.text
        except NotFiniteError as error:  # the spike guard decides what to do
            logger.info("skipping the sample: %s", error.problem)
            return
        self._callbacks.on_sample(step, text)

    def make_stop_error(self, error: OSError, step: int) -> UserError:
        """The error for stopping, with the state saved, after a file operation has failed."""
        self._checkpointer.wait()
        user_error = files.to_user_error(error, "read or write", self.run.folder)
        return UserError(
            f"{user_error.problem}; saved step {step:,} and stopped", user_error.remedy
        )
