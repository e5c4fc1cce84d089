"""Set up a training run: prepare data, find the run to resume, self-check, estimate, plan steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from mlxgpt import __version__
from mlxgpt.backend import device, device_errors, execution
from mlxgpt.config import Config, config_from_tree, override_config
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.hub import DatasetUnavailableError
from mlxgpt.data.prepare import find_or_prepare
from mlxgpt.data.prepare_job import PrepareRequest
from mlxgpt.data.token_array import blocks_per_epoch
from mlxgpt.distributed.agreement import check_same_values
from mlxgpt.distributed.group import ProcessGroup, run_main_first
from mlxgpt.storage.run import Run
from mlxgpt.training import selfcheck
from mlxgpt.training.auto_size import choose_model_size
from mlxgpt.training.callbacks import Callback
from mlxgpt.training.estimate import (
    NO_ESTIMATE,
    Estimate,
    check_estimated_memory,
    check_memory_limit,
    check_model_memory,
    combine_estimates,
    estimate_training,
)
from mlxgpt.training.finetune import InitWeights, find_base_validation
from mlxgpt.training.job import TrainJob, TrainRequest
from mlxgpt.training.reference import add_reference
from mlxgpt.training.resume import (
    apply_run_plan,
    check_resumable,
    find_environment_changes,
    find_resumable_run,
    is_finished,
    median_step_seconds,
)
from mlxgpt.training.retries import retry_on_gpu_failure
from mlxgpt.training.scaling_law import find_scaling_law, law_path
from mlxgpt.training.schedule import learning_rate_schedule
from mlxgpt.training.step import check_divisible
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def setup_job(
    request: TrainRequest, group: ProcessGroup, callbacks: Callback
) -> Iterator[TrainJob]:
    """Context that makes the job for a request, the same on every rank; the main rank holds the
    run's lock.

    Raises:
        UserError: for problems that the user can fix.
    """
    _check_request(request)
    for line in execution.slow_reasons():
        logger.info(line)
    config, dataset, warning = run_main_first(group, partial(_prepare_data, request, callbacks))
    config = device.resolve_dtype(config)
    config = fit_to_data(config, dataset, strict_vocab=request.strict_vocab)
    check_divisible(config.sequences_per_step, group.size)
    weights = request.init_weights
    base_val = find_base_validation(weights.parent, dataset, request.data_dir) if weights else None
    check_same_values(
        group,
        "settings",
        {
            **_collect_settings(config, dataset, weights),
            "base model's data": base_val is not None,
        },
    )
    check_model_memory(config)
    memory_limit = int(1e9 * request.memory_limit) if request.memory_limit else None
    check_estimated_memory(config, group.size, memory_limit)
    device.limit_memory(memory_limit)
    folder = request.run_folder(dataset)
    if config.lora.lora_rank and weights:
        _check_base_folder(folder, weights.parent)
    try:
        with (
            files.file_lock(folder, "training") if group.is_main else nullcontext(),
            device_errors.convert_device_errors("; stopped"),
        ):
            if weights:
                dataset = run_main_first(group, partial(add_reference, dataset, config, weights))
            job = TrainJob(
                config,
                dataset,
                folder,
                find_resumable_run(folder) if group.is_main else None,
                NO_ESTIMATE,
                init_weights=weights,
                base_val=base_val,
                memory_limit_bytes=memory_limit,
                warning=warning,
            )
            yield _plan_job(request, job, group, callbacks)
    except KeyboardInterrupt:
        if not files.exists(folder / "run.json"):
            logger.info(f"keeping {dataset.folder}; the same command reuses it")
        raise


def _plan_job(
    request: TrainRequest, job: TrainJob, group: ProcessGroup, callbacks: Callback
) -> TrainJob:
    """Add the plan to a job: what the main rank decides from its run and its timings."""
    run, minutes = job.run, request.max_minutes
    finished_step, must_check = None, True
    config = job.config
    if run:
        if minutes:
            config = apply_run_plan(config, run, request.auto_size)
        check_resumable(run, config, job.dataset, job.init_weights)
        finished_step = run.steps()[-1] if is_finished(run, config) else None
        must_check = not run.last_environment() or bool(find_environment_changes(run, group.size))
    elif group.is_main and minutes and request.auto_size:
        law = find_scaling_law(law_path(request.runs_dir, config, job.dataset))
        config = choose_model_size(config, job.dataset, 60 * minutes, law)
    config_tree, finished_step, must_check = group.broadcast(
        "config", [asdict(config), finished_step, must_check]
    )
    job = replace(
        job,
        config=config_from_tree(config_tree),
        finished_step=finished_step,
        resumed=run is not None,
    )
    if job.finished_step is not None:
        if run:
            logger.info(f"{run.name} is finished: {job.finished_step:,} steps")
            job = replace(job, run=replace(run, config=job.config))
        return job
    job = retry_on_gpu_failure(
        partial(check_and_estimate, group=group, callbacks=callbacks, must_check=must_check),
        job,
        group,
    )
    config = job.config
    limit = job.memory_limit_bytes or device.free_memory_bytes()
    check_memory_limit(config, job.estimate.peak_bytes, limit)
    if minutes and group.is_main and not run:
        config = _plan_for_minutes(config, job.estimate, minutes)
    config = config_from_tree(group.broadcast("plan", asdict(config)))
    if group.is_main:
        _log_long_warmup(config)
    return replace(job, config=config, start_time=time.monotonic())


def check_and_estimate(
    job: TrainJob, group: ProcessGroup, callbacks: Callback, *, must_check: bool = True
) -> TrainJob:
    """Run the self-check if `must_check`, and add the estimate to the job. Both compile the same
    functions as training, so compiler failures show up here.
    """
    if must_check:
        for check in selfcheck.run_self_check(job.config):
            callbacks.on_check(check)
            if check.ok is False:
                raise UserError(
                    f"the self-check failed: {check.name}: {check.detail}",
                    "run mlxgpt check and report its output; do not train on this machine until it "
                    "passes.",
                )
    known_step_seconds = None
    if job.run and group.size == 1 and not job.is_retry:  # a retry may run without compiled kernels
        known_step_seconds = median_step_seconds(job.run)
    estimate = estimate_training(
        job.config, job.dataset, known_step_seconds, group, job.init_weights
    )
    return replace(job, estimate=combine_estimates(group, job.config, estimate), is_retry=False)


def _check_request(request: TrainRequest) -> None:
    limit, minutes = request.memory_limit, request.max_minutes
    if request.config.lora.lora_rank and not request.init_weights:
        raise UserError(
            "--lora-rank trains adapters of a trained model, and there is none",
            "choose one: --init-from RUN.",
        )
    if request.config.train.beta and not request.init_weights:
        raise UserError(
            "--beta is for DPO, which starts from a trained model, and there is none",
            "choose one: --init-from RUN.",
        )
    if limit is not None and not 0 < limit < math.inf:
        raise UserError(
            f"--memory-limit {limit} is not a valid size", "use a number of GB above 0."
        )
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"--max-minutes {minutes} is not a valid duration", "use a number above 0.")


def _prepare_data(request: TrainRequest, callbacks: Callback) -> tuple[Config, Dataset, str | None]:
    """Find or prepare the data. Returns config, dataset and, if the fallback was used, a warning.

    Raises:
        UserError: if the data cannot be prepared, or its tokenizer differs from the weights'.
    """
    tokenizer = request.init_weights.tokenizer if request.init_weights else None

    def prepare(config: Config) -> Dataset:
        prepare_request = PrepareRequest(
            config.data,
            config.model.vocab_size,
            request.strict_vocab,
            tokenizer=tokenizer,
            examples=request.init_weights.examples if request.init_weights else None,
        )
        return find_or_prepare(prepare_request, request.data_dir, callbacks.on_prepare)

    config, warning = request.config, None
    try:
        dataset = prepare(config)
    except DatasetUnavailableError as error:
        if not request.fallback_source:
            raise
        warning = f"{error.problem}; using the built-in dataset {request.fallback_source} instead"
        logger.warning(warning)
        config = override_config(config, {"source": request.fallback_source})
        dataset = prepare(config)
    if dataset.meta.has_examples and not (request.init_weights and request.init_weights.examples):
        raise UserError(
            f"{dataset.folder} contains prompts and answers, prepared for another run",
            "use the original file: mlxgpt train --init-from RUN --source FILE.",
        )
    if tokenizer and dataset.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{dataset.folder} was prepared with a different tokenizer than the initial weights",
            "use the original text: --source FILE.",
        )
    return config, dataset, warning


def _check_base_folder(folder: Path, base: Run) -> None:
    """Check that a run of adapters is in the same folder as its base, where it looks for it."""
    if folder.absolute().parent != base.folder.absolute().parent:
        raise UserError(
            f"{base.name} is not in {folder.absolute().parent}, the folder of the new run",
            f"copy it there, or use --runs-dir {base.folder.parent}: a run of adapters needs its "
            "base next to it.",
        )


SOURCE_FIELDS = ("source", "val_source")  # may differ between ranks; the data's hash is compared


def _collect_settings(
    config: Config, dataset: Dataset, init_weights: InitWeights | None
) -> dict[str, object]:
    """Versions, settings and data that must be the same on all ranks."""
    return {
        "mlxgpt": __version__,
        "mlx": version("mlx"),
        "computing on": device.device_type(),
        "kernels": "not fused" if execution.compile_failure() else "fused",
        "data": f"{dataset.name} ({dataset.meta.fingerprint[:12]})",
        "initial weights": dict(init_weights.origin) if init_weights else {},
        **{
            name: value
            for section in asdict(config).values()
            for name, value in section.items()
            if name not in SOURCE_FIELDS
        },
    }


def fit_to_data(config: Config, dataset: Dataset, *, strict_vocab: bool = False) -> Config:
    """Enlarge the vocabulary size to the data's if needed, and check the length of the data.

    Raises:
        UserError: if the data is too short for one step, or, with `strict_vocab`, if `vocab_size`
            is too small.
    """
    vocab_size = dataset.meta.vocab_size
    if dataset.meta.has_examples:
        return config
    if config.model.vocab_size < vocab_size and not strict_vocab:
        config = override_config(config, {"vocab_size": vocab_size})
    if config.model.vocab_size < vocab_size:
        raise UserError(
            f"vocab_size = {config.model.vocab_size} is too small for {dataset.name}",
            f"use --vocab-size {vocab_size}, or omit it.",
        )
    tokens, block_size = len(dataset.train.ids), config.model.block_size
    blocks_per_epoch(tokens, block_size)  # raises if the data is too short
    t = config.train
    if config.tokens_per_step > tokens:
        max_batch_size = tokens // block_size // t.gradient_accumulation_steps
        raise UserError(
            f"the training split has {tokens:,} tokens, fewer than one step needs "
            f"({t.gradient_accumulation_steps} × {t.batch_size} × {block_size})",
            f"use a larger dataset, or --batch-size {max_batch_size} or less."
            if max_batch_size
            else "use a larger dataset, or fewer --gradient-accumulation-steps.",
        )
    return config


WARMUP_DIVISOR = 10  # warmup is at most a tenth of the steps planned by time


def set_max_steps(config: Config, steps: int) -> Config:
    """Set the number of steps, with at most a tenth of them for warmup."""
    # A warmup meant for a longer run could fill a short one.
    warmup = min(config.optim.warmup_steps, math.ceil(steps / WARMUP_DIVISOR))
    return override_config(config, {"max_steps": steps, "warmup_steps": warmup})


MIN_STEPS = 2


def _plan_for_minutes(config: Config, estimate: Estimate, minutes: float) -> Config:
    """Set the number of steps to as many as fit into `minutes`."""
    steps = estimate.steps_within(60 * minutes, config)
    if steps < MIN_STEPS:
        raise UserError(
            f"--max-minutes {minutes:g} is too short for {MIN_STEPS} steps, at an estimated "
            f"{estimate.step_seconds:.2g} s per step",
            "use more minutes, or make steps smaller with --batch-size or "
            "--gradient-accumulation-steps.",
        )
    return set_max_steps(config, steps)


def _log_long_warmup(config: Config) -> None:
    warmup, steps = config.optim.warmup_steps, config.train.max_steps
    if warmup < steps:
        return
    max_learning_rate = float(learning_rate_schedule(config)(steps - 1))
    logger.info(
        f"the whole run is warmup ({warmup:,} warmup steps, {steps:,} steps in total): the "
        f"learning rate only reaches {max_learning_rate:.2g}; consider --warmup-steps "
        f"{steps // WARMUP_DIVISOR}"
    )
