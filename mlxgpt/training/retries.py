"""Training is retried after a failure of the GPU, from the newest checkpoint."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import mlx.core as mx

from mlxgpt.backend import device_errors, execution
from mlxgpt.backend.device_errors import DeviceError
from mlxgpt.config import Config, override
from mlxgpt.distributed.group import ProcessGroup
from mlxgpt.storage import checkpoint
from mlxgpt.storage.logs import Notes
from mlxgpt.training.job import TrainJob

logger = logging.getLogger(__name__)

T = TypeVar("T")
PAUSES = (5.0, 20.0, 60.0)  # seconds before each retry of a row
pause = time.sleep


def retry_on_gpu_failure(attempt: Callable[[TrainJob], T], job: TrainJob, group: ProcessGroup) -> T:
    """Retry after a failure of the GPU, at most `len(PAUSES)` times in a row. A row ends when an
    attempt logs or saves a step that no attempt before it reached. Several ranks do not retry: the
    first failure is raised.

    If memory ran out, the next attempt takes micro-batches of half the size, and twice as many.

    Args:
        attempt: creates all its arrays itself, from the run's newest checkpoint or from the seed:
            those of a failed attempt may hold anything.

    Raises:
        UserError: if the GPU keeps failing.
    """
    failures, furthest = 0, 0
    while True:
        try:
            return attempt(job)
        except RuntimeError as error:
            line = failure = None
            if group.size == 1:
                line = execution.disable_compilation_after(error)
                failure = device_errors.classify(error)
            if not line and not failure:
                raise
        # After the handler, so that nothing holds the failed attempt's arrays any more.
        _release_device()
        if line:
            logger.info(f"{line}; starting over")
            job = _retried(job, job.config)
            continue
        assert failure
        saved = checkpoint.steps(job.folder / "checkpoints")
        reached = max([0, *saved, *(record["step"] for record in Notes(job.folder).metrics())])
        failures = 1 if reached > furthest else failures + 1
        furthest = max(furthest, reached)
        outcome = f"; stopped, and saved at step {saved[-1]:,}" if saved else "; nothing was saved"
        if failures > len(PAUSES):
            outcome = f", {failures} times in a row{outcome}"
        if failures > len(PAUSES) or not failure.recoverable:
            raise failure.to_user_error(outcome)
        config = job.config
        if failure.out_of_memory:
            config = _with_smaller_batch(config, failure, outcome)
        problem, seconds = failure.to_user_error().problem, PAUSES[failures - 1]
        logger.info(f"{problem}; trying again in {seconds:g} s")
        pause(seconds)
        job = _retried(job, config)


def _retried(job: TrainJob, config: Config) -> TrainJob:
    return replace(job, config=config, is_retry=True)


def _with_smaller_batch(config: Config, failure: DeviceError, outcome: str) -> Config:
    """The same step in smaller micro-batches: half as large, if their size is even."""
    t = config.train
    size = next((n for n in range(t.batch_size // 2, 0, -1) if t.batch_size % n == 0), None)
    if size is None:
        raise failure.to_user_error(f", with one sequence at a time{outcome}")
    accumulation = t.gradient_accumulation_steps * t.batch_size // size
    return override(config, {"batch_size": size, "gradient_accumulation_steps": accumulation})


def _release_device() -> None:
    """Wait for what a failed attempt left on the device, and free its memory."""
    gc.collect()
    for _ in range(2):  # commands behind the failed one may have failed, too
        with suppress(RuntimeError):
            mx.synchronize()
    mx.clear_cache()
