"""Retry training from the newest checkpoint after a GPU failure."""

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
from mlxgpt.config import Config, override_config
from mlxgpt.distributed.group import ProcessGroup
from mlxgpt.storage import checkpoint
from mlxgpt.storage.logs import RunLogs
from mlxgpt.training.job import TrainJob

logger = logging.getLogger(__name__)

T = TypeVar("T")
sleep = time.sleep

RETRY_DELAYS = (5.0, 20.0, 60.0)  # seconds before the 1st, 2nd and 3rd retry in a row


def retry_on_gpu_failure(attempt: Callable[[TrainJob], T], job: TrainJob, group: ProcessGroup) -> T:
    """Call `attempt`, and retry after GPU failures, at most `len(RETRY_DELAYS)` times in a row. The
    count restarts when an attempt logs or saves a step that no earlier attempt has reached. With
    several ranks, the first failure is raised.

    If memory ran out, the next attempt uses smaller micro-batches, and more of them.

    Args:
        attempt: must create all its arrays itself, from the run's newest checkpoint or the seed,
            because a failed attempt may leave its arrays corrupted.

    Raises:
        UserError: if the GPU keeps failing.
    """
    failures, furthest_step = 0, 0
    while True:
        try:
            return attempt(job)
        except RuntimeError as error:
            message = failure = None
            if group.size == 1:
                message = execution.disable_compilation_on_error(error)
                failure = device_errors.classify_device_error(error)
            if not message and not failure:
                raise
        # Outside the handler, whose exception keeps the failed attempt's arrays alive.
        _release_device()
        if message:
            logger.info(f"{message}; restarting from step 0")
            job = _make_retry_job(job, job.config)
            continue
        assert failure
        saved_steps = checkpoint.list_steps(job.folder / "checkpoints")
        logged_steps = (record["step"] for record in RunLogs(job.folder).metrics())
        last_step = max([0, *saved_steps, *logged_steps])
        failures = 1 if last_step > furthest_step else failures + 1
        furthest_step = max(furthest_step, last_step)
        outcome = (
            f"; stopped; the last checkpoint is from step {saved_steps[-1]:,}"
            if saved_steps
            else "; no checkpoint was saved"
        )
        if failures > len(RETRY_DELAYS):
            outcome = f", {failures} times in a row{outcome}"
        if failures > len(RETRY_DELAYS) or not failure.recoverable:
            raise failure.to_user_error(outcome)
        config = job.config
        if failure.out_of_memory:
            config = _reduce_batch_size(config, failure, outcome)
        problem, seconds = failure.to_user_error().problem, RETRY_DELAYS[failures - 1]
        logger.info(f"{problem}; retrying in {seconds:g} s")
        sleep(seconds)
        job = _make_retry_job(job, config)


def _make_retry_job(job: TrainJob, config: Config) -> TrainJob:
    return replace(job, config=config, is_retry=True)


def _reduce_batch_size(config: Config, failure: DeviceError, outcome: str) -> Config:
    """Split a step into smaller micro-batches: half the size if it is even."""
    t = config.train
    batch_size = next((n for n in range(t.batch_size // 2, 0, -1) if t.batch_size % n == 0), None)
    if batch_size is None:
        raise failure.to_user_error(f", even with micro-batches of one sequence{outcome}")
    accumulation_steps = t.gradient_accumulation_steps * t.batch_size // batch_size
    return override_config(
        config, {"batch_size": batch_size, "gradient_accumulation_steps": accumulation_steps}
    )


def _release_device() -> None:
    """Wait for a failed attempt's pending work on the device, and free its memory."""
    gc.collect()
    for _ in range(2):  # commands queued after the failed one may have failed, too
        with suppress(RuntimeError):
            mx.synchronize()
    mx.clear_cache()
