"""Plan of a comparison, before anything is trained: each variant's steps, time and memory."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlxgpt.backend import device
from mlxgpt.config import Config, override
from mlxgpt.distributed.group import LOCAL
from mlxgpt.experiments.budget import Budget
from mlxgpt.experiments.registry import Registry, training_key
from mlxgpt.experiments.variants import Variant
from mlxgpt.training.callbacks import Callback
from mlxgpt.training.estimate import (
    NO_ESTIMATE,
    Estimate,
    measure,
    refuse_by_estimate,
    refuse_too_large,
)
from mlxgpt.training.job import TrainJob
from mlxgpt.training.retries import retry_on_gpu_failure
from mlxgpt.training.setup import check_and_measure, fit_to_data, planned
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

MOST_EVALUATIONS, FEWEST_EVALUATIONS = 20, 5  # points of a curve
EVALUATED_SHARE = 0.2  # of the work of a training, a forward pass being a third of a step
TIMINGS = 3  # of each variant in turn, where a time is to be planned


class Estimates:
    """Runs the self-check and the first steps of each variant, once."""

    def __init__(self, folder: Path, callback: Callback) -> None:
        self._folder, self._callback = folder, callback
        self._by_name: dict[str, Estimate] = {}

    def of(self, variant: Variant) -> Estimate:
        """The estimate of a variant; raises UserError if it takes more memory than there is."""
        if variant.name not in self._by_name:
            job = TrainJob(variant.config, variant.dataset, self._folder, None, NO_ESTIMATE)
            attempt = partial(check_and_measure, group=LOCAL, callbacks=self._callback)
            estimate = retry_on_gpu_failure(attempt, job, LOCAL).estimate
            refuse_too_large(variant.config, estimate.peak_bytes, device.free_bytes())
            self._by_name[variant.name] = estimate
        return self._by_name[variant.name]


def plan(
    variants: Sequence[Variant], budget: Budget, registry: Registry, estimates: Estimates
) -> list[Variant]:
    """The variants, each with a config for its data and as long as its budget.

    Raises:
        UserError: if one cannot be trained on its data or in this memory, or two are the same.
    """
    fitted = [replace(v, config=_fitted(v)) for v in variants]
    if budget.unit == "seconds":
        steps = _steps_in_time(fitted, budget, registry, estimates)
    else:
        steps = [budget.steps(v.config, math.nan) for v in fitted]
    variants = [replace(v, config=_sized(v, n)) for v, n in zip(fitted, steps, strict=True)]
    _must_differ(variants)
    return variants


def _fitted(variant: Variant) -> Config:
    config = fit_to_data(device.resolve_dtype(variant.config), variant.dataset)
    refuse_by_estimate(config)
    return config


def _steps_in_time(
    variants: Sequence[Variant], budget: Budget, registry: Registry, estimates: Estimates
) -> list[int]:
    """Steps of each variant that fit into the budget, timed in turns. A comparison that resumes
    takes those planned before.
    """
    keys = [f"{training_key(v.config, v.dataset)} {budget.amount:g}s" for v in variants]
    if not set(keys) <= registry.plan.keys():
        logger.info("timing each variant in turn")
        times = [[estimates.of(v).step_seconds] for v in variants]
        for _ in range(TIMINGS - 1):
            for variant, seconds in zip(variants, times, strict=True):
                seconds.append(measure(variant.config, variant.dataset).step_seconds)
        for key, variant, seconds in zip(keys, variants, times, strict=True):
            registry.plan[key] = budget.steps(variant.config, statistics.median(seconds))
        registry.save()
    return [registry.plan[key] for key in keys]


def _sized(variant: Variant, steps: int) -> Config:
    """A variant's config for so many steps: its schedule as long as these, and a curve of some
    points.
    """
    config = variant.config
    work = 3 * steps * config.tokens_per_step
    points = int(EVALUATED_SHARE * work / len(variant.dataset.val.ids))
    every = math.ceil(steps / min(max(points, FEWEST_EVALUATIONS), MOST_EVALUATIONS))
    decay_steps = config.optim.decay_steps * steps / config.train.max_steps
    return override(
        planned(config, steps),
        {
            "decay_steps": math.ceil(decay_steps),
            "eval_interval": every,
            "eval_tokens": len(variant.dataset.val.ids),
            "save_interval": every,
            "log_interval": max(1, every // 5),
            "sample_tokens": 0,
            "keep_checkpoints": 1,
            "snapshots": False,
        },
    )


def _must_differ(variants: Sequence[Variant]) -> None:
    names: dict[str, str] = {}
    for variant in variants:
        key = training_key(variant.config, variant.dataset)
        if key in names:
            raise UserError(
                f"{names[key]} and {variant.name} are the same training",
                "compare configs that differ in a setting that affects the weights.",
            )
        names[key] = variant.name
