"""Plan a comparison before training: steps, time and memory of each variant."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlxgpt.backend import device
from mlxgpt.config import Config, override_config
from mlxgpt.distributed.group import LOCAL_GROUP
from mlxgpt.experiments.budget import Budget
from mlxgpt.experiments.registry import Registry, training_key
from mlxgpt.experiments.variants import Variant
from mlxgpt.training.callbacks import Callback
from mlxgpt.training.estimate import (
    NO_ESTIMATE,
    Estimate,
    check_estimated_memory,
    check_memory_limit,
    estimate_training,
)
from mlxgpt.training.job import TrainJob
from mlxgpt.training.retries import retry_on_gpu_failure
from mlxgpt.training.setup import check_and_estimate, fit_to_data, set_max_steps
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


class EstimateCache:
    """Runs the self-check and first steps of each variant once, and keeps the estimates."""

    def __init__(self, folder: Path, callback: Callback) -> None:
        self._folder, self._callback = folder, callback
        self._by_name: dict[str, Estimate] = {}

    def get(self, variant: Variant) -> Estimate:
        """Estimate of a variant; raises UserError if it needs more memory than is free."""
        if variant.name not in self._by_name:
            job = TrainJob(variant.config, variant.dataset, self._folder, None, NO_ESTIMATE)
            attempt = partial(check_and_estimate, group=LOCAL_GROUP, callbacks=self._callback)
            estimate = retry_on_gpu_failure(attempt, job, LOCAL_GROUP).estimate
            check_memory_limit(variant.config, estimate.peak_bytes, device.free_memory_bytes())
            self._by_name[variant.name] = estimate
        return self._by_name[variant.name]


def plan_variants(
    variants: Sequence[Variant], budget: Budget, registry: Registry, estimates: EstimateCache
) -> list[Variant]:
    """Fit the config of each variant to its data and to the budget.

    Raises:
        UserError: if a variant cannot be trained on its data or in this memory, or two are equal.
    """
    fitted_variants = [replace(v, config=_fit_config(v)) for v in variants]
    if budget.unit == "seconds":
        steps = _plan_steps_for_time(fitted_variants, budget, registry, estimates)
    else:
        steps = [budget.steps(v.config, math.nan) for v in fitted_variants]
    variants = [
        replace(v, config=_config_for_steps(v, n))
        for v, n in zip(fitted_variants, steps, strict=True)
    ]
    _check_distinct(variants)
    return variants


def _fit_config(variant: Variant) -> Config:
    config = fit_to_data(device.resolve_dtype(variant.config), variant.dataset)
    check_estimated_memory(config)
    return config


TIMING_REPEATS = 3  # per variant; the median is used


def _plan_steps_for_time(
    variants: Sequence[Variant], budget: Budget, registry: Registry, estimates: EstimateCache
) -> list[int]:
    """Number of steps of each variant that fit into a time budget, timed in turn. A resumed
    comparison uses its earlier plan.
    """
    keys = [f"{training_key(v.config, v.dataset)} {budget.amount:g}s" for v in variants]
    if not set(keys) <= registry.plan.keys():
        logger.info("measuring the speed of each variant")
        timings = [[estimates.get(v).step_seconds] for v in variants]
        for _ in range(TIMING_REPEATS - 1):
            for variant, seconds in zip(variants, timings, strict=True):
                seconds.append(estimate_training(variant.config, variant.dataset).step_seconds)
        for key, variant, seconds in zip(keys, variants, timings, strict=True):
            registry.plan[key] = budget.steps(variant.config, statistics.median(seconds))
        registry.save()
    return [registry.plan[key] for key in keys]


MAX_EVALUATIONS, MIN_EVALUATIONS = 20, 5  # points of a learning curve
EVAL_COMPUTE_FRACTION = 0.2  # of a run's FLOPs; a forward pass takes a third of a step's


def _config_for_steps(variant: Variant, steps: int) -> Config:
    """Config of a variant for `steps` steps, with schedule and evaluation interval scaled."""
    config = variant.config
    forward_tokens = 3 * steps * config.tokens_per_step
    evaluations = int(EVAL_COMPUTE_FRACTION * forward_tokens / len(variant.dataset.val.ids))
    interval = math.ceil(steps / min(max(evaluations, MIN_EVALUATIONS), MAX_EVALUATIONS))
    decay_steps = config.optim.decay_steps * steps / config.train.max_steps
    return override_config(
        set_max_steps(config, steps),
        {
            "decay_steps": math.ceil(decay_steps),
            "eval_interval": interval,
            "eval_tokens": len(variant.dataset.val.ids),
            "save_interval": interval,
            "log_interval": max(1, interval // 5),
            "sample_tokens": 0,
            "keep_checkpoints": 1,
            "snapshots": False,
        },
    )


def _check_distinct(variants: Sequence[Variant]) -> None:
    names_by_key: dict[str, str] = {}
    for variant in variants:
        key = training_key(variant.config, variant.dataset)
        if key in names_by_key:
            raise UserError(
                f"{names_by_key[key]} and {variant.name} would train identically",
                "compare configs that differ in a setting that affects the weights.",
            )
        names_by_key[key] = variant.name
