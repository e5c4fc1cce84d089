"""Training loop: runs steps, and logs, evaluates and saves them.

The host is at most one step ahead of the device: while the device computes a step, the host builds
the next batch, and reads and logs the metrics of the previous step. It waits for the device only to
save, evaluate or take a snapshot.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlxgpt.backend import device, execution, macos
from mlxgpt.config import Config
from mlxgpt.distributed.agreement import check_same_arrays
from mlxgpt.distributed.group import ProcessGroup
from mlxgpt.storage.run import Run
from mlxgpt.training.callbacks import Callback, TrainingSummary
from mlxgpt.training.checkpointer import is_scheduled_checkpoint
from mlxgpt.training.job import TrainJob
from mlxgpt.training.metrics import StepMetrics, StepTimer
from mlxgpt.training.resume import broadcast_state, load_newest_checkpoint, resume_or_create_run
from mlxgpt.training.run_writer import RunWriter
from mlxgpt.training.signals import catch_stop_signals
from mlxgpt.training.snapshots import is_snapshot_step
from mlxgpt.training.spike_guard import MAX_ROLLBACKS, SpikeGuard
from mlxgpt.training.step import StepInputs, TrainStep, make_train_step
from mlxgpt.training.validation import Validation
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


class DivergedError(UserError):
    """Training diverged: the loss spiked or was not finite too many times."""


@dataclass(frozen=True)
class PendingStep:
    """A step that runs on the device; its loss and gradient norm are not read yet.

    Attributes:
        step: step number, from 0.
        loss_limit: largest loss for which the step is applied.
        seconds: see `StepMetrics`.
    """

    step: int
    learning_rate: mx.array
    loss: mx.array
    grad_norm: mx.array
    loss_limit: float
    seconds: float


def run_training_loop(job: TrainJob, group: ProcessGroup, callbacks: Callback) -> TrainingSummary:
    """Train a run from its newest checkpoint, or from the start, until it is finished or stopped;
    saves it at the end. Collective: every rank calls this with the same job.

    All randomness is a function of (seed, purpose, step), so an interruption does not change it.

    Raises:
        UserError: if training stopped for a reason that the user can fix.
        DivergedError: if training diverged.
    """
    if job.finished_step is not None:
        return _make_summary(job, job.run, job.finished_step, 0.0)
    config, max_steps = job.config, job.config.train.max_steps
    memory_limit = job.memory_limit_bytes or math.inf
    step_function = make_train_step(config, group, job.init_weights)
    # A resumed run replaces them by those of its checkpoint.
    reference = step_function.model.parameters() if config.train.beta else {}
    step_inputs = StepInputs(job.dataset.train, config, group)
    with (
        resume_or_create_run(job, group, step_function, callbacks) as (run, start),
        group.watchdog(job.estimate.step_seconds),
        RunWriter(run, job.dataset, step_function, callbacks) if run else nullcontext() as writer,
    ):
        guard, step = start.guard, start.step
        validate = Validation(job.dataset, step_function, start.bos, job.base_val, reference)
        timer = StepTimer(config, job.dataset.tokens_per_step(config), group.size)
        handler = StepResultHandler(group, step_function, guard, validate, writer, timer)
        handler.begin(step, start.unlogged_metrics)
        pending: PendingStep | None = None
        is_stopped = is_over_memory_limit = False
        with (
            catch_stop_signals() as stop_requested,
            execution.shield_from_sigint(),
            macos.prevent_sleep(),
        ):
            if config.train.patience:
                is_stopped = group.should_stop(handler.is_out_of_patience())
            inputs = step_inputs(step, guard.batch_offset) if step < max_steps else None
            while inputs and step < max_steps and not is_stopped:
                # Start the step; the device computes it while the host does the rest.
                loss_limit, learning_rate = guard.loss_limit(step), inputs[1]
                loss, grad_norm = step_function(*inputs, loss_limit)
                mx.async_eval(loss, grad_norm, step_function.state)
                if step + 1 < max_steps:
                    inputs = step_inputs(step + 1, guard.batch_offset)

                if pending:  # the previous step
                    handler.log(handler.read_metrics(pending))
                seconds = handler.timer.elapsed_seconds()
                pending = PendingStep(step, learning_rate, loss, grad_norm, loss_limit, seconds)
                step += 1

                # Saving and evaluation use the weights after this step, so the device waits.
                if needs_weights(config, step) and not guard.must_stop:
                    metrics, pending = handler.read_metrics(pending), None
                    handler.save_and_evaluate(metrics)

                if not guard.must_stop:
                    is_over_memory_limit = device.memory_in_use()[0] > memory_limit
                    is_stopped = group.should_stop(
                        is_over_memory_limit
                        or handler.has_failed()
                        or handler.is_out_of_patience()
                        or stop_requested()
                    )
                    if is_stopped and pending:
                        handler.log(handler.read_metrics(pending))
                if guard.spike_step is not None and not guard.has_diverged:
                    step, pending, is_stopped = handler.roll_back(), None, False
                    inputs = step_inputs(step, guard.batch_offset)
                if guard.has_diverged:
                    break
        mx.eval(step_function.state)
        if writer:
            writer.finish(step, guard)
        group.raise_on_all_ranks(_make_stop_error(job, step, guard, is_over_memory_limit))
        return _make_summary(job, run, step, time.monotonic() - job.start_time)


def _make_summary(job: TrainJob, run: Run | None, step: int, seconds: float) -> TrainingSummary:
    """Summary of training; without losses on a non-main rank, which has no run."""
    if not run:
        steps = job.config.train.max_steps
        return TrainingSummary.for_non_main_rank(job.folder, job.dataset.folder, step, steps)
    summary = TrainingSummary.from_run(run, job.dataset, step, seconds=seconds, resumed=job.resumed)
    return replace(summary, warning=job.warning)


def is_eval_step(config: Config, step: int) -> bool:
    """Whether the model is evaluated after `step` steps."""
    return _is_due(config, step, config.train.eval_interval)


def is_log_step(config: Config, step: int) -> bool:
    """Whether the metrics of a step (from 1) are logged."""
    return is_eval_step(config, step) or _is_due(config, step, config.train.log_interval)


def needs_weights(config: Config, step: int) -> bool:
    """Whether a checkpoint, evaluation or snapshot is due after `step` steps."""
    return (
        is_scheduled_checkpoint(config, step)
        or is_eval_step(config, step)
        or is_snapshot_step(step)
    )


def _is_due(config: Config, step: int, interval: int) -> bool:
    return step % interval == 0 or step == config.train.max_steps


class StepResultHandler:
    """Handles step results: logs, saves, evaluates and rolls back. Runs on every rank, since it
    calls collectives, but only the main rank writes.

    Args:
        writer: writer of the run's records; None on non-main ranks.
    """

    def __init__(
        self,
        group: ProcessGroup,
        step_function: TrainStep,
        guard: SpikeGuard,
        validate: Validation,
        writer: RunWriter | None,
        timer: StepTimer,
    ) -> None:
        self._group, self._step_function, self._guard = group, step_function, guard
        self._validate, self._writer, self.timer = validate, writer, timer
        self._config = step_function.config
        self._has_warned = False  # about a zero gradient

    def begin(self, step: int, unlogged_metrics: dict[str, float] | None) -> None:
        """Before the first step: take a snapshot if due, and evaluate and log a step that was saved
        before the run was killed.

        Args:
            step: steps taken so far.
            unlogged_metrics: metrics of that step if it was saved but not logged, else None.
        """
        self.timer.restart(step)
        if self._writer and is_snapshot_step(step):
            self._writer.save_snapshot(step)
        if step == 0 and (base := self._validate.evaluate_base()):
            logger.info(f"loss on the base model's validation data, before: {base.loss:.4f}")
        if unlogged_metrics:
            lr, loss, grad_norm = (unlogged_metrics[name] for name in ("lr", "loss", "grad_norm"))
            metrics = StepMetrics(step, lr, loss, grad_norm, seconds=0.0)
            self._evaluate(metrics)
            self.log(metrics)
        self._group.barrier("start")

    def read_metrics(self, pending: PendingStep) -> StepMetrics:
        """Wait for a step's loss and gradient norm, and record them in the spike guard."""
        loss, grad_norm = float(pending.loss), float(pending.grad_norm)
        if grad_norm == 0.0 and self._writer and not self._has_warned:
            self._has_warned = True
            logger.warning(f"the gradient of step {pending.step + 1:,} is zero: it changed nothing")
        self._guard.record(pending.step, loss, grad_norm, pending.loss_limit)
        if self._guard.spike_step is not None and not self._can_roll_back():
            self._guard.skip_spike()
        learning_rate = float(pending.learning_rate)
        return StepMetrics(pending.step + 1, learning_rate, loss, grad_norm, pending.seconds)

    def log(self, metrics: StepMetrics) -> None:
        """Log a step if it is due."""
        is_due = is_log_step(self._config, metrics.step) and not self._guard.must_stop
        if self._writer and is_due:
            self._writer.log(self.timer.record(metrics, self._guard.skipped))

    def save_and_evaluate(self, metrics: StepMetrics) -> None:
        """Wait for a step, then save, evaluate, log and take a snapshot, each if due. Saving comes
        first, so that nothing is lost if the rest fails.
        """
        if self._guard.must_stop:
            return
        mx.eval(self._step_function.state)
        with self.timer.pause():
            step, is_saved = metrics.step, is_scheduled_checkpoint(self._config, metrics.step)
            if is_saved:
                check_same_arrays(self._group, step, *self._step_function.state_dicts())
                if self._writer:
                    self._writer.save(step, metrics, self._guard)
            self._evaluate(metrics)
            self.log(metrics)
            if self._writer and is_snapshot_step(step):
                self._writer.save_snapshot(step)
            if is_saved:
                self._group.barrier("checkpoint")

    def is_out_of_patience(self) -> bool:
        """Whether the validation loss has not improved for too long, so that training must stop."""
        return self._writer is not None and self._writer.is_out_of_patience

    def has_failed(self) -> bool:
        """Whether a write has failed, so that training must stop."""
        return self._writer is not None and self._writer.has_failed()

    def roll_back(self) -> int:
        """Restore the newest checkpoint after a loss spike; returns its step."""
        guard = self._guard
        state: dict[str, Any] | None = None
        assert guard.spike_step is not None
        if self._writer:
            run, steps = self._writer.run, self._writer.scheduled_checkpoint_steps()
            checkpoint = load_newest_checkpoint(run, steps, self._step_function)
            logger.info(
                f"loss spike at step {guard.spike_step + 1:,}: rolled back to step "
                f"{checkpoint.step:,}, continuing with different batches"
            )
            run.truncate_after(checkpoint.step)
            run.log_rollback(checkpoint.step, guard.spike_step + 1)
            state = {"step": checkpoint.step, "guard": checkpoint.guard}
        state = broadcast_state(self._group, self._step_function, state)
        step = int(state["step"])
        guard.roll_back(step, state["guard"])
        self.timer.restart(step)
        if self._writer and is_snapshot_step(step):
            self._writer.save_snapshot(step)
        return step

    def _evaluate(self, metrics: StepMetrics) -> None:
        if is_eval_step(self._config, metrics.step):
            try:
                evaluations = self._validate(metrics.step)
                if self._writer:
                    self._writer.add_evaluation(metrics, *evaluations)
            except OSError as error:
                if not self._writer:
                    raise
                raise self._writer.make_stop_error(error, metrics.step) from error

    def _can_roll_back(self) -> bool:
        can_roll_back = bool(self._writer and self._writer.scheduled_checkpoint_steps())
        if self._writer and not can_roll_back:
            logger.info("loss spike ignored: there is no checkpoint to roll back to")
        return bool(self._group.broadcast("can roll back", can_roll_back))


def _make_stop_error(
    job: TrainJob, step: int, guard: SpikeGuard, is_over_memory_limit: bool
) -> UserError | None:
    """The error that makes training stop early, if any."""
    if guard.has_diverged:
        return _make_diverged_error(job.config, guard, step)
    if is_over_memory_limit and step < job.config.train.max_steps:
        return UserError(
            f"training exceeded the memory limit of {(job.memory_limit_bytes or 0) / 1e9:g} GB: "
            f"saved step {step:,} and stopped",
            "run the same command with a larger --memory-limit to resume from there.",
        )
    return None


def _make_diverged_error(config: Config, guard: SpikeGuard, step: int) -> DivergedError:
    reason = (
        f"the loss spiked again after {MAX_ROLLBACKS} rollbacks"
        if guard.rollbacks > MAX_ROLLBACKS
        else f"{guard.consecutive_skips} consecutive steps with a non-finite loss or gradient"
    )
    learning_rate = config.optim.learning_rate
    remedies = [f"a --learning-rate below {learning_rate:g}, or more --warmup-steps"]
    if config.train.dtype != "float32":
        remedies.append("--dtype float32")
    if not config.optim.grad_clip:
        remedies.append("--grad-clip 1")
    return DivergedError(
        f"training diverged: {reason}; stopped at step {step:,} and saved the weights of the last "
        "good step",
        f"start a new run with {', '.join(remedies)}; or check the dataset for corrupt text.",
    )
