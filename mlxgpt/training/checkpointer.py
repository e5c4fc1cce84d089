"""Write checkpoints in a background thread while training continues."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import mlx.core as mx

from mlxgpt.config import Config
from mlxgpt.storage import checkpoint
from mlxgpt.storage.run import Run
from mlxgpt.training.step import TrainStep
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError


def is_scheduled_checkpoint(config: Config, step: int) -> bool:
    """Whether the config schedules a checkpoint after `step` steps. Other checkpoints are written
    only because training stopped there.
    """
    t = config.train
    return step == t.max_steps or step % t.save_interval == 0 or step % t.eval_interval == 0


OTHER_FILES_BYTES = 1 << 20  # reserved for manifest, metrics and samples


class AsyncCheckpointer:
    """Writes checkpoints of a run in a background thread, one at a time.

    MLX arrays are immutable and each step creates new ones, so it keeps references to the arrays
    of a step instead of copies.

    Args:
        keep: number of newest scheduled checkpoints to keep, in addition to the best.
        on_save: called in the thread with step, bytes and seconds of each checkpoint.
    """

    def __init__(self, run: Run, keep: int, on_save: Callable[[int, int, float], None]) -> None:
        self._run, self._keep, self._on_save = run, keep, on_save
        self._pool = ThreadPoolExecutor(1, "checkpointer")
        self._pending_write: Future[None] | None = None

    def close(self, exc_type: type[BaseException] | None = None) -> None:
        """Wait for all writes and end the thread; after a KeyboardInterrupt, do not wait.

        Args:
            exc_type: type of the exception that ended training, if any.
        """
        self._pool.shutdown(wait=exc_type is not KeyboardInterrupt)
        if exc_type is None:
            self.wait()

    def save(
        self,
        step: int,
        step_function: TrainStep,
        metrics: Mapping[str, float],
        guard: Mapping[str, Any],
    ) -> None:
        """Start writing a checkpoint of the current state.

        Raises:
            UserError: if the previous checkpoint could not be written, or the disk is nearly full
                and training should stop; this checkpoint is still written if it fits.
        """
        self.wait()
        parameters, optimizer = (
            {name: mx.contiguous(value) for name, value in arrays.items()}
            for arrays in step_function.state_dicts()
        )
        mx.eval(parameters, optimizer)  # the thread needs evaluated arrays
        size = sum(array.nbytes for part in (parameters, optimizer) for array in part.values())
        free = shutil.disk_usage(self._run.folder).free
        if free < size + OTHER_FILES_BYTES:
            saved_steps = self._run.steps()
            raise UserError(
                f"the disk is full: {free / 1e6:,.0f} MB free, but a checkpoint needs "
                f"{size / 1e6:,.0f} MB",
                "free some space; the same command resumes from "
                + (f"step {saved_steps[-1]:,}." if saved_steps else "the beginning."),
            )

        def write() -> None:
            start_time = time.monotonic()
            self._run.sync_logs()  # metrics must be on disk before the checkpoint
            self._run.save(
                self._run.checkpoints, step, parameters, optimizer, metrics=metrics, guard=guard
            )
            best = self._run.best()  # raises if unknown, before anything is deleted
            scheduled_steps = [
                n for n in self._run.steps() if is_scheduled_checkpoint(self._run.config, n)
            ]
            steps_to_keep = {step, best["step"] if best else step, *scheduled_steps[-self._keep :]}
            checkpoint.prune_checkpoints(self._run.checkpoints, steps_to_keep)
            self._on_save(step, size, time.monotonic() - start_time)

        self._pending_write = self._pool.submit(write)
        if free < 2 * (size + OTHER_FILES_BYTES):
            self.wait()
            raise UserError(
                f"the disk is nearly full: saved step {step:,} and stopped, because another "
                f"checkpoint ({size / 1e6:,.0f} MB) would not fit",
                "free some space; the same command resumes from there.",
            )

    def submit(self, write: Callable[[], None]) -> None:
        """Run another write in the thread, after the ones already queued."""
        self._pool.submit(write)

    def wait(self) -> None:
        """Wait for the pending checkpoint; raises UserError if it could not be written."""
        if self._pending_write:
            future, self._pending_write = self._pending_write, None
            try:
                future.result()
            except OSError as error:
                raise files.to_user_error(error, "read or write", self._run.folder) from error

    def has_failed(self) -> bool:
        """Whether the pending checkpoint could not be written; `wait` then raises the error."""
        return bool(
            self._pending_write and self._pending_write.done() and self._pending_write.exception()
        )
