"""The function behind `mlxgpt scale`: trains models of several sizes and lengths, fits a scaling
law, and checks it on a larger model that the fit has not seen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxgpt.backend import device
from mlxgpt.config import Config, override_config
from mlxgpt.config.resolve import PathLike, resolve_folder
from mlxgpt.data import prepare
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.holdout import hold_out_from_train
from mlxgpt.data.prepare_job import PrepareRequest
from mlxgpt.experiments import scaling_report
from mlxgpt.experiments.budget import parse_budget
from mlxgpt.experiments.compare import DEFAULT_SEEDS, check_folder_name
from mlxgpt.experiments.planning import EstimateCache
from mlxgpt.experiments.registry import open_registry
from mlxgpt.experiments.results import record_to_json
from mlxgpt.experiments.runner import format_machine
from mlxgpt.experiments.scaling_fit import ScalingFit, fit_scaling_law
from mlxgpt.experiments.scaling_results import (
    LengthResult,
    ModelSize,
    ScalingRecord,
    SizeAdvice,
)
from mlxgpt.experiments.training_runs import StudyCallback, TrainingRuns
from mlxgpt.experiments.variants import Variant
from mlxgpt.model.stats import count_parameters
from mlxgpt.training.auto_size import (
    MAX_EFFECTIVE_EPOCHS,
    MIN_STEP_TOKENS,
    MODEL_SIZES,
    TOKENS_PER_PARAMETER,
    resolve_auto_size,
    shape_overrides,
)
from mlxgpt.training.callbacks import CallbackList
from mlxgpt.training.scaling_law import find_scaling_law, law_path, write_scaling_law
from mlxgpt.training.setup import fit_to_data, set_max_steps
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

SIZES = ((1, 64), (2, 64), *MODEL_SIZES)  # (n_layer, n_embd)
FITTED_SIZES = 4  # the next larger one is the test
LENGTH_RATIOS = (1 / 4, 1 / 2, 1)  # of the longest runs, for each fitted size
MIN_STEPS = 100  # of the shortest runs: shorter ones do not fit the law (docs/scaling.md)
ADVICE_MINUTES = (1, 5, 30)  # besides the budget


class ScaleCallback(StudyCallback):
    """Receives the events of a scaling study and of each of its runs."""

    def on_result(self, result: LengthResult) -> None:
        """A run ended; its loss is the last one of the result."""


def scale(
    *,
    budget: str,
    recipe: str = "racing",
    seeds: int = DEFAULT_SEEDS,
    name: str | None = None,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
    callbacks: Sequence[ScaleCallback] = (),
    **settings: Any,
) -> ScalingRecord:
    """Measure how the loss falls with parameters and tokens, on this text and this machine.

    Four sizes are trained for three lengths each, every length with its own learning-rate schedule.
    A law is fitted to their losses, and a fifth size tests it. Losses are those of the end of the
    training text, which is held out. The same call resumes; no run is trained twice. The result is
    also written to runs/compare/NAME. If the test is as predicted, `train` with `max_minutes` uses
    the law.

    Args:
        budget: time for all runs together, such as `2h`; it determines sizes and lengths.
        recipe: `racing` or `modern`.
        seeds: number of seeds for each size and length.
        name: name of the result's folder; default: from data, recipe and budget.
        callbacks: receive the events of each run, as in a comparison.
        settings: other config fields, such as `source`.

    Raises:
        UserError: if the budget or the text is too small.
    """
    parsed_budget = parse_budget(budget)
    if parsed_budget.unit != "seconds":
        raise UserError(f"--budget {budget} is not a time", "use, for example, --budget 2h.")
    if seeds < 1:
        raise UserError(f"--seeds {seeds} is too few", "use --seeds 1 or more.")
    config = resolve_auto_size(recipe, "mlxgpt scale", settings)
    request = PrepareRequest(config.data, config.model.vocab_size)
    progress = CallbackList(callbacks).on_prepare
    dataset = prepare.find_or_prepare(request, resolve_folder("data", data_dir), progress)
    base = _make_base(config, dataset)
    runs_folder = resolve_folder("runs", runs_dir)
    name = check_folder_name(name or f"scale-{dataset.name}-{recipe}-{budget.replace(' ', '')}")
    folder = runs_folder / "compare" / name
    law_file = law_path(runs_folder, config, dataset)
    find_scaling_law(law_file)  # so that one in a newer format is not overwritten
    with files.file_lock(folder, "scaling study"):
        folder.mkdir(parents=True, exist_ok=True)
        study = _ScalingStudy(base, folder, callbacks)
        fitted, test = study.plan(parsed_budget.amount, seeds)
        record = ScalingRecord(
            name=name,
            budget=budget,
            recipe=recipe,
            data=dataset.name,
            train_tokens=len(base.dataset.train.ids),
            held_out_bytes=base.dataset.meta.val.bytes,
            machine=format_machine(),
            fitted=fitted,
            test=test,
        )
        record.interrupted = not study.train(record.results, seeds)
        if all(len(result.losses) == seeds for result in record.results) and study.converged:
            record.fit = fit_scaling_law([result.point for result in record.fitted])
            minutes = {*ADVICE_MINUTES, parsed_budget.amount / 60}
            record.advice = study.advise(record.fit, sorted(minutes))
            if record.law_holds:
                write_scaling_law(law_file, record.fit.law)
        files.write_atomically(folder / f"{name}.json", record_to_json(record))
        files.write_atomically(folder / f"{name}.md", scaling_report.render_scaling(record))
    return record


def _make_base(config: Config, dataset: Dataset) -> Variant:
    """The smallest model with its data, of which the end is held out.

    Raises:
        UserError: if the text is too short.
    """
    held_out = hold_out_from_train(dataset)
    batch_size = max(1, MIN_STEP_TOKENS // config.model.block_size)
    config = override_config(config, {"batch_size": batch_size, **shape_overrides(*SIZES[0])})
    config = fit_to_data(device.resolve_dtype(config), held_out)
    base = Variant("base", config, held_out, dataset)
    max_steps, min_steps = _max_steps(base), _min_steps()
    if max_steps < min_steps:
        raise UserError(
            f"{dataset.name} has {len(held_out.train.ids):,} tokens, too few to fit a scaling law",
            f"use a text with {math.ceil(10 * min_steps / max_steps) / 10} times as many.",
        )
    return base


def _max_steps(base: Variant) -> int:
    """Steps after which the text has been seen MAX_EFFECTIVE_EPOCHS times."""
    return MAX_EFFECTIVE_EPOCHS * len(base.dataset.train.ids) // base.config.tokens_per_step


def _min_steps() -> int:
    """Steps of the longest runs, so that the shortest have MIN_STEPS."""
    return math.ceil(MIN_STEPS / min(LENGTH_RATIOS))


class _ScalingStudy:
    """Plans and trains the runs of a scaling study.

    Attributes:
        converged: whether no run has diverged.
    """

    def __init__(self, base: Variant, folder: Path, callbacks: Sequence[ScaleCallback]) -> None:
        self._base, self._callbacks = base, callbacks
        self._registry = open_registry(folder)
        self._estimates = EstimateCache(folder.parent, CallbackList(callbacks))
        self._runs = TrainingRuns(folder.parent, self._registry, self._estimates, callbacks)
        self.converged = True

    def plan(self, seconds: float, seeds: int) -> tuple[list[LengthResult], LengthResult]:
        """Sizes and lengths for a time, without results: those to fit, and the test. They are the
        largest sizes of which the test sees enough tokens. A resumed study uses its earlier plan.

        Raises:
            UserError: if the time or the text is too short.
        """
        if "longest" not in self._registry.plan:
            self._registry.plan.update(self._choose_plan(seconds, seeds))
            self._registry.save()
        first, longest = (self._registry.plan[key] for key in ("first", "longest"))
        sizes = self._sizes(first)
        fitted = [
            self._result(size, max(1, round(ratio * longest)))
            for size in sizes[:-1]
            for ratio in LENGTH_RATIOS
        ]
        return fitted, self._result(sizes[-1], longest)

    def _choose_plan(self, seconds: float, seeds: int) -> dict[str, int]:
        max_steps, min_steps = _max_steps(self._base), _min_steps()
        logger.info("measuring the speed of each size")
        plan: dict[str, int] = {}
        for first in range(len(SIZES) - FITTED_SIZES):
            try:
                sizes = self._sizes(first)
            except UserError:  # does not fit into memory
                if not plan:
                    raise
                break
            # The fitted sizes are trained for all lengths, the test for the longest alone.
            step_seconds = [size.step_seconds for size in sizes]
            seconds_per_step = sum(LENGTH_RATIOS) * sum(step_seconds[:-1]) + step_seconds[-1]
            steps = int(seconds / seeds / seconds_per_step)
            if not plan and steps < min_steps:
                minutes = math.ceil(1.1 * min_steps * seeds * seconds_per_step / 60)
                raise UserError(
                    f"{seconds / 60:g} minutes are too short for {seeds} × "
                    f"{FITTED_SIZES * len(LENGTH_RATIOS) + 1} runs of {MIN_STEPS} steps or more",
                    f"use --budget {minutes}m or more, or fewer --seeds.",
                )
            tokens_per_parameter = steps * self._tokens_per_step / sizes[-1].parameters
            if plan and tokens_per_parameter < TOKENS_PER_PARAMETER:
                break
            plan = {"first": first, "longest": min(steps, max_steps)}
        if plan["longest"] == max_steps:
            logger.info(
                f"the longest runs see the text {MAX_EFFECTIVE_EPOCHS} times; beyond that another "
                "law holds, so a part of the time is not used"
            )
        return plan

    @property
    def _tokens_per_step(self) -> int:
        return self._base.config.tokens_per_step

    def _sizes(self, first: int) -> list[ModelSize]:
        return [self._time_size(*shape) for shape in SIZES[first : first + FITTED_SIZES + 1]]

    def _time_size(self, layers: int, width: int) -> ModelSize:
        variant = self._variant(layers, width, self._base.config.train.max_steps)
        seconds = self._estimates.get(variant).step_seconds
        return ModelSize(layers, width, count_parameters(variant.config.model), seconds)

    def _result(self, size: ModelSize, steps: int) -> LengthResult:
        return LengthResult(size, steps, steps * self._tokens_per_step)

    def _variant(self, layers: int, width: int, steps: int) -> Variant:
        config = override_config(self._base.config, shape_overrides(layers, width))
        config = override_config(
            set_max_steps(config, steps),
            {
                "eval_interval": steps,
                "eval_tokens": len(self._base.dataset.val.ids),
                "save_interval": max(1, steps // 4),
                "log_interval": max(1, steps // 20),
                "sample_tokens": 0,
                "keep_checkpoints": 1,
                "snapshots": False,
            },
        )
        return replace(self._base, name=f"{layers} × {width}", config=config)

    def train(self, results: Sequence[LengthResult], seeds: int) -> bool:
        """Train all sizes and lengths, seed by seed; returns False if interrupted."""
        first_seed, done = self._base.config.train.seed, 0
        for seed in range(first_seed, first_seed + seeds):
            for result in results:
                size = result.size
                variant = self._variant(size.n_layer, size.n_embd, result.steps)
                run = self._runs.train(variant, seed, done, seeds * len(results))
                if run is None:
                    return False
                done += 1
                result.losses.append(run.bits_per_byte)
                if run.curve is None:
                    self.converged = False
                    logger.warning(f"{result.name}, seed {seed} diverged: no law is fitted")
                for callback in self._callbacks:
                    callback.on_result(result)
        return True

    def advise(self, fit: ScalingFit, minutes: Sequence[float]) -> list[SizeAdvice]:
        """The best size for each training time. Larger sizes are timed as long as the loss for the
        last time, the longest, falls.
        """
        candidates: list[ModelSize] = []
        losses: list[float] = []
        for shape in SIZES:
            try:
                size = self._time_size(*shape)
            except UserError:  # does not fit into memory
                break
            candidates.append(size)
            losses.append(fit.law.predict(size.parameters, self._tokens(size, minutes[-1])))
            if losses[-1] > min(losses):
                break
        return [self._advise(fit, candidates, m) for m in minutes]

    def _tokens(self, size: ModelSize, minutes: float) -> int:
        return max(1, int(60 * minutes / size.step_seconds)) * self._tokens_per_step

    def _advise(
        self, fit: ScalingFit, candidates: Sequence[ModelSize], minutes: float
    ) -> SizeAdvice:
        def predict(size: ModelSize) -> float:
            return fit.law.predict(size.parameters, self._tokens(size, minutes))

        size = min(candidates, key=predict)
        tokens = self._tokens(size, minutes)
        epochs = tokens / len(self._base.dataset.train.ids)
        low, high = fit.interval(size.parameters, tokens)
        return SizeAdvice(minutes, size, tokens, epochs, predict(size), low, high)
