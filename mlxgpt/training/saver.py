"""Writes a training's checkpoints beside it: the training goes on meanwhile."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import mlx.core as mx

from mlxgpt import files
from mlxgpt.config import Config
from mlxgpt.errors import UserError
from mlxgpt.storage import checkpoint
from mlxgpt.storage.run import Run
from mlxgpt.training.step import TrainStep

OTHER_FILES = 1 << 20  # bytes beside the arrays: manifest, metrics, samples


def is_regular(config: Config, step: int) -> bool:
    """Whether a checkpoint is written after so many steps, whatever happens: not only where the
    training was stopped.
    """
    t = config.train
    return step == t.max_steps or step % t.save_interval == 0 or step % t.eval_interval == 0


class Saver:
    """Writes checkpoints of one run, one at a time, in a thread of its own.

    Arrays never change, a step makes new ones: to hold on to those of a step is all the snapshot
    there is. Use it as a context; at its end everything is written.

    Args:
        keep: how many of the newest regular ones are kept, beside the best.
        saved: is told step, bytes and seconds of each; from the thread.
    """

    def __init__(self, run: Run, keep: int, saved: Callable[[int, int, float], None]) -> None:
        self._run, self._keep, self._saved = run, keep, saved
        self._pool = ThreadPoolExecutor(1, "saver")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=kind is not KeyboardInterrupt)  # which quits at once
        if kind is None:
            self.wait()

    def save(
        self,
        step: int,
        step_function: TrainStep,
        metrics: Mapping[str, float],
        guard: Mapping[str, Any],
    ) -> None:
        """Begin to write a checkpoint of the state as it is.

        Raises:
            UserError: if the one before could not be written, or the disk is nearly full: with
                room for this one it is written, and the training should end.
        """
        self.wait()
        parameters, optimizer = (
            {name: mx.contiguous(value) for name, value in arrays.items()}
            for arrays in step_function.arrays()
        )
        mx.eval(parameters, optimizer)  # a thread can only read what is computed
        size = sum(array.nbytes for part in (parameters, optimizer) for array in part.values())
        free = shutil.disk_usage(self._run.folder).free
        if free < size + OTHER_FILES:
            there = self._run.steps()
            raise UserError(
                f"the disk is full: {free / 1e6:,.0f} MB are left, and a checkpoint takes "
                f"{size / 1e6:,.0f}",
                "free some space; the same command goes on from "
                + (f"step {there[-1]:,}." if there else "the beginning."),
            )

        def write() -> None:
            began = time.monotonic()
            self._run.sync_notes()  # a checkpoint that survives has its metrics
            self._run.save(
                self._run.checkpoints, step, parameters, optimizer, metrics=metrics, guard=guard
            )
            best = self._run.best()  # raises where it cannot be known, and nothing is deleted
            regular = [n for n in self._run.steps() if is_regular(self._run.config, n)]
            kept = {step, best["step"] if best else step, *regular[-self._keep :]}
            checkpoint.prune(self._run.checkpoints, kept)
            self._saved(step, size, time.monotonic() - began)

        self._writing = self._pool.submit(write)
        if free < 2 * (size + OTHER_FILES):
            self.wait()
            raise UserError(
                f"the disk is nearly full: stopped and saved at step {step:,}, and another "
                f"checkpoint of {size / 1e6:,.0f} MB would not fit",
                "free some space; the same command goes on from there.",
            )

    def beside(self, write: Callable[[], None]) -> None:
        """Have something else written by the thread, after what it is at."""
        self._pool.submit(write)

    def wait(self) -> None:
        """Wait for what is being written; raises UserError if it could not be."""
        if self._writing:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except OSError as error:
                raise files.os_error(error, "read or write", self._run.folder) from error

    def failed(self) -> bool:
        """Whether what was being written could not be; `wait` then says why."""
        return bool(self._writing and self._writing.done() and self._writing.exception())
