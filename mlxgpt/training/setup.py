"""Setup of a training run: find or prepare the data, name the run, check, estimate, plan."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version

from mlxgpt import __version__
from mlxgpt.backend import device, device_errors, execution
from mlxgpt.config import Config, from_tree, override
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.hub import Unavailable
from mlxgpt.data.prepare import PrepareRequest, find_or_prepare
from mlxgpt.data.token_array import blocks_per_epoch
from mlxgpt.distributed.agreement import require_same
from mlxgpt.distributed.group import ProcessGroup, in_turns
from mlxgpt.training import selfcheck
from mlxgpt.training.auto_size import sized
from mlxgpt.training.callbacks import Callback
from mlxgpt.training.estimate import (
    NO_ESTIMATE,
    Estimate,
    combine,
    measure,
    must_fit,
    refuse_by_estimate,
    refuse_too_large,
)
from mlxgpt.training.init_weights import InitWeights
from mlxgpt.training.job import TrainJob, TrainRequest
from mlxgpt.training.resume import (
    as_planned,
    changes_since,
    find_run,
    is_finished,
    require_match,
    step_seconds,
)
from mlxgpt.training.retries import retry_on_gpu_failure
from mlxgpt.training.schedule import learning_rate_schedule
from mlxgpt.training.step import check_divisible
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

WARMUP_SHARE = 10  # warmup is at most one step in ten of a plan that is made for a time
FEWEST_STEPS = 2  # of a plan
SOURCES = ("source", "val_source")  # where the text is may differ; the data's hash is compared


@contextmanager
def setup(request: TrainRequest, group: ProcessGroup, callbacks: Callback) -> Iterator[TrainJob]:
    """Make the job of a request, the same on every rank; the main rank holds the run's lock.

    Raises:
        UserError: for everything that the user can change.
    """
    _check_limits(request)
    for line in execution.slow_reasons():
        logger.info(line)
    config, dataset, warning = in_turns(group, partial(_prepare_data, request, callbacks))
    config = device.resolve_dtype(config)
    config = fit_to_data(config, dataset, strict_vocab=request.strict_vocab)
    check_divisible(config.sequences_per_step, group.size)
    require_same(group, "settings", _settings(config, dataset, request.init_weights))
    must_fit(config)
    memory_limit = int(1e9 * request.memory_limit) if request.memory_limit else None
    refuse_by_estimate(config, group.size, memory_limit)
    device.limit_memory(memory_limit)
    folder = request.folder(dataset)
    try:
        with (
            files.only_one(folder, "training") if group.is_main else nullcontext(),
            device_errors.as_user_errors("; stopped"),
        ):
            job = TrainJob(
                config,
                dataset,
                folder,
                find_run(folder) if group.is_main else None,
                NO_ESTIMATE,
                init_weights=request.init_weights,
                memory_limit=memory_limit,
                warning=warning,
            )
            yield _planned_job(request, job, group, callbacks)
    except KeyboardInterrupt:
        if not files.exists(folder / "run.json"):
            logger.info(f"{dataset.folder} is kept; the same command continues from there")
        raise


def _planned_job(
    request: TrainRequest, job: TrainJob, group: ProcessGroup, callbacks: Callback
) -> TrainJob:
    """The job with its plan: what the main rank decides by its run and its clock."""
    run, minutes = job.run, request.max_minutes
    finished, must_check = None, True
    config = job.config
    if run:
        if minutes:
            config = as_planned(config, run, request.fit_size)
        require_match(run, config, job.dataset, job.init_weights)
        finished = run.steps()[-1] if is_finished(run, config) else None
        must_check = not run.surroundings() or bool(changes_since(run, group.size))
    elif group.is_main and minutes and request.fit_size:
        config = sized(config, job.dataset, 60 * minutes)
    told = group.broadcast("config", [asdict(config), finished, must_check])
    job = replace(job, config=from_tree(told[0]), finished_step=told[1], resumed=run is not None)
    if job.finished_step is not None:
        if run:
            logger.info(f"{run.name} is finished: {job.finished_step:,} steps")
            job = replace(job, run=replace(run, config=job.config))
        return job
    job = retry_on_gpu_failure(
        partial(check_and_measure, group=group, callbacks=callbacks, must_check=told[2]), job, group
    )
    config = job.config
    limit = job.memory_limit or device.free_bytes()
    refuse_too_large(config, job.estimate.peak_bytes, limit)
    if minutes and group.is_main and not run:
        config = _planned_for(config, job.estimate, minutes)
    config = from_tree(group.broadcast("plan", asdict(config)))
    if group.is_main:
        _log_long_warmup(config)
    return replace(job, config=config, started=time.monotonic())


def check_and_measure(
    job: TrainJob, group: ProcessGroup, callbacks: Callback, *, must_check: bool = True
) -> TrainJob:
    """The job with its estimate, after the self-check where that is due. Both compile what training
    runs, so that a compiler that fails, fails here.
    """
    if must_check:
        for check in selfcheck.check(job.config):
            callbacks.on_check(check)
            if check.ok is False:
                raise UserError(
                    f"the self-check failed: {check.name}: {check.detail}",
                    "do not train on this; run mlxgpt check, and report what it says.",
                )
    known = None
    if job.run and group.size == 1 and not job.is_retry:  # a retry may run without compiled kernels
        known = step_seconds(job.run)
    estimate = measure(job.config, job.dataset, known, group)
    return replace(job, estimate=combine(group, job.config, estimate), is_retry=False)


def _check_limits(request: TrainRequest) -> None:
    limit, minutes = request.memory_limit, request.max_minutes
    if limit is not None and not 0 < limit < math.inf:
        raise UserError(f"--memory-limit {limit} is not a size", "give gigabytes above 0.")
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(
            f"--max-minutes {minutes} is not a length of time", "give a number above 0."
        )


def _prepare_data(request: TrainRequest, callbacks: Callback) -> tuple[Config, Dataset, str | None]:
    """The config with its data; or, with a warning, with the fallback's.

    Raises:
        UserError: if the data could not be prepared, or has another tokenizer than the weights.
    """
    tokenizer = request.init_weights.tokenizer if request.init_weights else None

    def prepared(config: Config) -> Dataset:
        wanted = PrepareRequest(
            config.data, config.model.vocab_size, request.strict_vocab, tokenizer=tokenizer
        )
        return find_or_prepare(wanted, request.data_dir, callbacks.on_prepare)

    config, warning = request.config, None
    try:
        dataset = prepared(config)
    except Unavailable as error:
        if not request.fallback:
            raise
        warning = f"{error.problem}: this is the built-in {request.fallback} instead"
        logger.warning(warning)
        config = override(config, {"source": request.fallback})
        dataset = prepared(config)
    if tokenizer and dataset.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{dataset.folder} was prepared with another tokenizer than that of the weights",
            "give the text itself: --source FILE.",
        )
    return config, dataset, warning


def _settings(
    config: Config, dataset: Dataset, init_weights: InitWeights | None
) -> dict[str, object]:
    """What all ranks must have in common."""
    return {
        "mlxgpt": __version__,
        "mlx": version("mlx"),
        "computing on": device.backend(),
        "kernels": "not fused" if execution.compile_failure() else "fused",
        "data": f"{dataset.name} ({dataset.meta.fingerprint[:12]})",
        "initial weights": dict(init_weights.origin) if init_weights else {},
        **{
            name: value
            for section in asdict(config).values()
            for name, value in section.items()
            if name not in SOURCES
        },
    }


def fit_to_data(config: Config, dataset: Dataset, *, strict_vocab: bool = False) -> Config:
    """The config with a vocabulary that the data fits into.

    Raises:
        UserError: if the text is too short for one step.
    """
    size = dataset.meta.vocab_size
    if config.model.vocab_size < size and not strict_vocab:
        config = override(config, {"vocab_size": size})
    if config.model.vocab_size < size:
        raise UserError(
            f"vocab_size = {config.model.vocab_size} is too small for {dataset.name}",
            f"use --vocab-size {size}, or leave it out.",
        )
    tokens, block = len(dataset.train.ids), config.model.block_size
    blocks_per_epoch(tokens, block)  # refuses a short text
    t = config.train
    if config.tokens_per_step > tokens:
        most = tokens // block // t.gradient_accumulation_steps
        raise UserError(
            f"the training text has {tokens:,} tokens, fewer than one step takes "
            f"({t.gradient_accumulation_steps} × {t.batch_size} × {block})",
            f"use a longer text, or --batch-size {most} or less."
            if most
            else "use a longer text, or fewer --gradient-accumulation-steps.",
        )
    return config


def planned(config: Config, steps: int) -> Config:
    """`config` for `steps` steps, at most a tenth of them warmup."""
    # A warmup that was meant for a longer plan would fill a short one.
    warmup = min(config.optim.warmup_steps, math.ceil(steps / WARMUP_SHARE))
    return override(config, {"max_steps": steps, "warmup_steps": warmup})


def _planned_for(config: Config, estimate: Estimate, minutes: float) -> Config:
    """`config` with as many steps as fit into a time."""
    steps = estimate.steps_in(60 * minutes, config)
    if steps < FEWEST_STEPS:
        raise UserError(
            f"in {minutes:g} minutes there is no time for {FEWEST_STEPS} steps of "
            f"{estimate.step_seconds:.2g} s",
            "give more minutes, or take smaller steps: --batch-size, "
            "--gradient-accumulation-steps.",
        )
    return planned(config, steps)


def _log_long_warmup(config: Config) -> None:
    warmup, steps = config.optim.warmup_steps, config.train.max_steps
    if warmup < steps:
        return
    highest = float(learning_rate_schedule(config)(steps - 1))
    logger.info(
        f"the whole run is warmup: {warmup:,} steps of it, and {steps:,} in all; the learning "
        f"rate rises to {highest:.2g} and no further. Shorter: --warmup-steps "
        f"{steps // WARMUP_SHARE}"
    )
