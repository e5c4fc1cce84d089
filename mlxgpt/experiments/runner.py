"""Train the variants of a comparison in turn, until all seeds are trained or it is decided.

Progress is reported to callbacks and the log. Existing runs are reused.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlxgpt.backend import device
from mlxgpt.data.dataset import Dataset
from mlxgpt.evaluation.loss import evaluate_run
from mlxgpt.experiments import sequential, verdict
from mlxgpt.experiments.budget import Budget
from mlxgpt.experiments.planning import EstimateCache, plan_variants
from mlxgpt.experiments.registry import RUNS_FOLDER, open_registry
from mlxgpt.experiments.results import ComparisonRecord, RunResult, VariantResult
from mlxgpt.experiments.statistics import ALPHA
from mlxgpt.experiments.training_runs import StudyCallback, TrainingRuns
from mlxgpt.experiments.variants import Variant, check_same_text, weight_affecting_diff
from mlxgpt.model.stats import count_parameters
from mlxgpt.storage import loading
from mlxgpt.storage.run import open_run
from mlxgpt.training.callbacks import CallbackList
from mlxgpt.utils import files

logger = logging.getLogger(__name__)


class CompareCallback(StudyCallback):
    """Receives the events of a comparison and of each of its runs."""

    def on_variant_end(self, record: ComparisonRecord) -> None:
        """A run ended, and the verdicts were updated."""


@dataclass(frozen=True)
class CompareRequest:
    """Name, budget and number of seeds of a comparison.

    Attributes:
        seeds: number per variant; with `until_decided`, the maximum.
        until_decided: add seeds until the interval excludes 0, or its half-width is below
            `min_effect`.
        final: judge on the validation split, after all runs.
    """

    name: str
    budget_text: str
    budget: Budget
    seeds: int
    until_decided: bool = False
    min_effect: float = 0.0
    final: bool = False


def run_comparison(
    variants: Sequence[Variant],
    request: CompareRequest,
    folder: Path,
    callbacks: Sequence[CompareCallback] = (),
) -> ComparisonRecord:
    """Train the variants, reusing existing runs, and judge them.

    Args:
        variants: the first is the baseline.
        folder: `runs/compare`.

    Raises:
        UserError: for any problem that the user can fix.
    """
    check_same_text(variants)
    with files.file_lock(folder / request.name, "comparison"):
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
        self._registry = open_registry(folder / request.name)
        estimates = EstimateCache(folder, CallbackList(callbacks))
        self._training_runs = TrainingRuns(folder, self._registry, estimates, callbacks)
        self._variants = plan_variants(variants, request.budget, self._registry, estimates)
        self._alpha = ALPHA
        if request.until_decided:
            self._alpha = sequential.per_look_alpha(max(1, len(variants) - 1), request.seeds)
        # Compare the settings as requested, before planning changes the number of steps.
        changes = [weight_affecting_diff(variants[0].config, v.config) for v in variants]
        self.record = self._new_record(changes)

    def _new_record(self, changes: Sequence[dict[str, tuple[Any, Any]]]) -> ComparisonRecord:
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
        baseline = self._variants[0]
        return ComparisonRecord(
            self._request.name,
            self._request.budget_text,
            baseline.dataset.name,
            baseline.dataset.meta.val.bytes,
            "held back",
            self._alpha,
            self._request.until_decided,
            format_machine(),
            results,
            looks=self._registry.looks,
            final_looks=self._registry.final_looks,
        )

    def run(self) -> ComparisonRecord:
        """Train and judge the variants, and save the registry."""
        self._train()
        record = self.record
        if not record.interrupted:
            if self._request.final:
                self._score_on_validation()
            elif not self._registry.looks or self._registry.looks[-1] != self._seeds_done():
                self._registry.looks.append(self._seeds_done())
            self._registry.save()
            record.looks, record.final_looks = self._registry.looks, self._registry.final_looks
        return record

    def _train(self) -> None:
        request = self._request
        steps_text = ", ".join(
            f"{result.name} {result.steps:,} steps" for result in self.record.variants
        )
        seeds_text = f"{'up to ' * request.until_decided}{request.seeds} seeds"
        logger.info("%s per variant: %s", seeds_text, steps_text)
        first_seed = self._variants[0].config.train.seed
        for seed_index in range(request.seeds):
            pairs = zip(self._variants, self.record.variants, strict=True)
            active = [(variant, result) for variant, result in pairs if not result.closed]
            if len(active) < 2 and seed_index:
                return  # all are decided
            # Alternate the order, so that a slowdown of the machine affects all variants equally.
            for variant, result in active if seed_index % 2 == 0 else active[::-1]:
                run_result = self._training_runs.train(
                    variant, first_seed + seed_index, *self._count_runs()
                )
                if run_result is None:
                    self.record.interrupted = True
                    self._assign_verdicts()
                    return
                result.trainings.append(run_result)
                result.closed |= run_result.curve is None
                self._assign_verdicts()
                for callback in self._callbacks:
                    callback.on_variant_end(self.record)
            if self.record.variants[0].diverged:
                return
            if request.until_decided:
                self._close_decided()

    def _close_decided(self) -> None:
        baseline, *candidates = self.record.variants
        for candidate in candidates:
            if not candidate.diverged:
                deltas = verdict.paired_deltas(baseline, candidate)
                decided = sequential.is_decided(deltas, self._alpha, self._request.min_effect)
                candidate.closed |= decided

    def _assign_verdicts(self) -> None:
        results = self.record.variants
        verdict.assign_verdicts(results, self._alpha, sequential=self._request.until_decided)
        self.record.drift = verdict.speed_drift(results)

    def _count_runs(self) -> tuple[int, int]:
        """Number of finished runs and estimated total; with `until_decided`, the total until the
        next look.
        """
        seeds = self._request.seeds
        if self._request.until_decided:
            seeds = max(sequential.MIN_SEEDS, self._seeds_done())
        results = self.record.variants
        counts = [len(result.trainings) for result in results]
        remaining = [seeds - len(result.trainings) for result in results if not result.closed]
        return sum(counts), sum(counts) + max(1, sum(remaining))

    def _seeds_done(self) -> int:
        return max(len(result.trainings) for result in self.record.variants)

    def _score_on_validation(self) -> None:
        """Replace the results on the held-out data by those on the validation split."""
        self._registry.final_looks += 1
        for variant, result in zip(self._variants, self.record.variants, strict=True):
            score = partial(self._validation_bits_per_byte, variant.full_dataset)
            result.trainings = [replace(run, bits_per_byte=score(run)) for run in result.trainings]
        self.record.judged_on = "validation"
        self._assign_verdicts()

    def _validation_bits_per_byte(self, full_dataset: Dataset, run_result: RunResult) -> float:
        if run_result.curve is None:
            return math.inf
        run = open_run(self._folder / RUNS_FOLDER / run_result.key)
        model, _ = loading.load_model(run, str(run.config.train.max_steps))
        return evaluate_run(run, model, full_dataset.val).bits_per_byte


def format_machine() -> str:
    """Device and MLX version, for a record."""
    return f"{device.device_name()}, {device.device_type()}, mlx {version('mlx')}"
