"""Trains variants in turns, seed by seed, until all seeds are trained or the comparison is decided.

Progress goes to callbacks and the log. A training that was done once is not repeated.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxgpt.backend import device
from mlxgpt.config import Config, changed_weights, override
from mlxgpt.data.dataset import Dataset
from mlxgpt.distributed.group import LOCAL
from mlxgpt.evaluation.loss import evaluate
from mlxgpt.experiments import sequential, verdict
from mlxgpt.experiments.budget import Budget
from mlxgpt.experiments.curves import curve
from mlxgpt.experiments.planning import Estimates, plan
from mlxgpt.experiments.registry import TRAININGS, open_registry, training_key
from mlxgpt.experiments.results import Record, Training, VariantResult
from mlxgpt.experiments.statistics import ALPHA
from mlxgpt.experiments.variants import Variant, must_be_one_text, weight_affecting_diff
from mlxgpt.model.stats import count_parameters
from mlxgpt.storage import loading
from mlxgpt.storage import run as runs
from mlxgpt.storage.run import Run
from mlxgpt.training.callbacks import Callback, CallbackList
from mlxgpt.training.job import TrainJob
from mlxgpt.training.loop import Diverged, train
from mlxgpt.training.resume import find_run, is_finished
from mlxgpt.training.retries import retry_on_gpu_failure
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


class CompareCallback(Callback):
    """Receives the events of a comparison, and those of each of its trainings."""

    def on_variant_begin(self, variant: str, seed: int, steps: int, done: int, total: int) -> None:
        """A training of a variant starts or resumes; `done` of about `total` are finished."""

    def on_variant_end(self, record: Record) -> None:
        """A training ended, and the results were judged again."""


@dataclass(frozen=True)
class CompareRequest:
    """What is to be compared, and how far.

    Attributes:
        seeds: of each variant; with `until_decided`, the most.
        until_decided: add seeds until the interval excludes 0, or extends less than `smallest` to
            either side.
        final: judge on the validation text, once all is trained.
    """

    name: str
    budget_text: str
    budget: Budget
    seeds: int
    until_decided: bool = False
    smallest: float = 0.0
    final: bool = False


def compare(
    variants: Sequence[Variant],
    request: CompareRequest,
    folder: Path,
    callbacks: Sequence[CompareCallback] = (),
) -> Record:
    """Train what is missing, and judge.

    Args:
        variants: the others are compared with the first.
        folder: `runs/compare`.

    Raises:
        UserError: for everything that the user can change.
    """
    must_be_one_text(variants)
    with files.only_one(folder / request.name, "comparison"):
        (folder / request.name).mkdir(parents=True, exist_ok=True)
        return _Comparison(variants, request, folder, callbacks).run()


class _Comparison:
    def __init__(
        self,
        variants: Sequence[Variant],
        request: CompareRequest,
        folder: Path,
        callbacks: Sequence[CompareCallback],
    ) -> None:
        self._request, self._folder, self._callbacks = request, folder, callbacks
        self._callback = CallbackList(callbacks)
        self._registry = open_registry(folder / request.name)
        self._estimates = Estimates(folder, self._callback)
        self._logged_reuse = False
        self._variants = plan(variants, request.budget, self._registry, self._estimates)
        self._level = ALPHA
        if request.until_decided:
            self._level = sequential.level(max(1, len(variants) - 1), request.seeds)
        # The settings as they were asked for, before the lengths are planned.
        changes = [weight_affecting_diff(variants[0].config, v.config) for v in variants]
        self.record = self._new_record(changes)

    def _new_record(self, changes: Sequence[dict[str, tuple[Any, Any]]]) -> Record:
        results = [
            VariantResult(
                name=variant.name,
                changes=change,
                parameters=count_parameters(variant.config.model),
                steps=variant.config.train.max_steps,
                tokens=variant.config.train.max_steps * variant.config.tokens_per_step,
            )
            for variant, change in zip(self._variants, changes, strict=True)
        ]
        first = self._variants[0]
        return Record(
            self._request.name,
            self._request.budget_text,
            first.dataset.name,
            first.dataset.meta.val.bytes,
            "held back",
            self._level,
            self._request.until_decided,
            f"{device.name()}, {device.backend()}, mlx {version('mlx')}",
            results,
            looks=self._registry.looks,
            final_looks=self._registry.final_looks,
        )

    def run(self) -> Record:
        """Train, judge, and save the registry."""
        self._train()
        record = self.record
        if not record.interrupted:
            if self._request.final:
                self._judge_on_validation()
            elif not self._registry.looks or self._registry.looks[-1] != self._seeds_done():
                self._registry.looks.append(self._seeds_done())
            self._registry.save()
            record.looks, record.final_looks = self._registry.looks, self._registry.final_looks
        return record

    def _train(self) -> None:
        request = self._request
        steps = ", ".join(
            f"{result.name} {result.steps:,} steps" for result in self.record.variants
        )
        seeds = f"{'up to ' * request.until_decided}{request.seeds} seeds"
        logger.info("%s of each: %s", seeds, steps)
        first_seed = self._variants[0].config.train.seed
        for n in range(request.seeds):
            pairs = list(zip(self._variants, self.record.variants, strict=True))
            still_open = [pair for pair in pairs if not pair[1].closed]
            if len(still_open) < 2 and n:
                return  # all are decided
            # Back and forth, so that a machine that slows down does so for all variants alike.
            for variant, result in still_open if n % 2 == 0 else still_open[::-1]:
                training = self._trained(variant, first_seed + n)
                if training is None:
                    self.record.interrupted = True
                    self._judge()
                    return
                result.trainings.append(training)
                result.closed |= training.curve is None
                self._judge()
                for callback in self._callbacks:
                    callback.on_variant_end(self.record)
            if self.record.variants[0].diverged:
                return
            if request.until_decided:
                self._close_what_is_decided()

    def _close_what_is_decided(self) -> None:
        first, *others = self.record.variants
        for other in others:
            if not other.diverged:
                pairs = verdict.pairs(first, other)
                other.closed |= sequential.is_decided(pairs, self._level, self._request.smallest)

    def _judge(self) -> None:
        results = self.record.variants
        verdict.judge(results, self._level, sequential=self._request.until_decided)
        self.record.drift = verdict.drift(results)

    def _trained(self, variant: Variant, seed: int) -> Training | None:
        """One training, from the registry if it was done before; None if it was interrupted."""
        config = override(variant.config, {"seed": seed})
        key = training_key(config, variant.dataset)
        if key in self._registry.diverged:
            return Training(seed, key, math.inf, None)
        folder = self._folder / TRAININGS / key
        with files.only_one(folder, "training"):
            run = find_run(folder)
            if run:
                _require_same_training(run, config, variant.dataset)
            if run and is_finished(run, config):
                self._log_reuse()
            else:
                try:
                    if not self._take_steps(variant, run, config, folder):
                        return None
                except Diverged:
                    self._registry.diverged.append(key)
                    self._registry.save()
                    return Training(seed, key, math.inf, None)
        points = curve(runs.open_run(folder))
        return Training(seed, key, points.last, points)

    def _log_reuse(self) -> None:
        """Log once that a training is not repeated."""
        if not self._logged_reuse:
            self._logged_reuse = True
            logger.info("reusing trainings from runs/compare/%s", TRAININGS)

    def _take_steps(self, variant: Variant, run: Run | None, config: Config, folder: Path) -> bool:
        """Train; whether it was trained to its end."""
        estimate = self._estimates.of(variant)
        done, total = self._counts()
        for callback in self._callbacks:
            callback.on_variant_begin(
                variant.name, config.train.seed, config.train.max_steps, done, total
            )
        job = TrainJob(config, variant.dataset, folder, run, estimate, resumed=run is not None)
        attempt = partial(train, group=LOCAL, callbacks=self._callback)
        summary = retry_on_gpu_failure(attempt, job, LOCAL)
        gc.collect()
        mx.clear_cache()
        return not summary.interrupted

    def _counts(self) -> tuple[int, int]:
        """Trainings that are finished, and about all; with `until_decided`, all until the next
        look.
        """
        seeds = self._request.seeds
        if self._request.until_decided:
            seeds = max(sequential.FIRST, self._seeds_done())
        results = self.record.variants
        counts = [len(result.trainings) for result in results]
        left = [seeds - len(result.trainings) for result in results if not result.closed]
        return sum(counts), sum(counts) + max(1, sum(left))

    def _seeds_done(self) -> int:
        return max(len(result.trainings) for result in self.record.variants)

    def _judge_on_validation(self) -> None:
        """Replace the results on the held-out part by those on the validation text."""
        self._registry.final_looks += 1
        for variant, result in zip(self._variants, self.record.variants, strict=True):
            result.trainings = [
                replace(training, bits_per_byte=self._final(variant.whole, training))
                for training in result.trainings
            ]
        self.record.judged_on = "validation"
        self._judge()

    def _final(self, whole: Dataset, training: Training) -> float:
        if training.curve is None:
            return math.inf
        run = runs.open_run(self._folder / TRAININGS / training.key)
        model, _ = loading.load_model(run, str(run.config.train.max_steps))
        return evaluate(run, model, whole.val).bits_per_byte


def _require_same_training(run: Run, config: Config, dataset: Dataset) -> None:
    same_data = run.data_fingerprint == dataset.meta.fingerprint
    if not same_data or changed_weights(run.config, config):
        raise UserError(
            f"{run.folder} is not the training of that name",
            "move this folder away; the same command trains it again.",
        )
