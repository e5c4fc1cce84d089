"""Made-up results, learning curves and scaling studies, and a small comparison to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxgpt import api
from mlxgpt.config import Config, override_config
from mlxgpt.experiments.curves import LearningCurve
from mlxgpt.experiments.results import ComparisonRecord, RunResult, VariantResult
from mlxgpt.experiments.runner import CompareCallback
from mlxgpt.experiments.scaling_fit import fit_scaling_law
from mlxgpt.experiments.scaling_results import (
    LengthResult,
    ModelSize,
    ScalingRecord,
    SizeAdvice,
)
from mlxgpt.training.scaling_law import ScalingLaw


def make_curve(
    values: Sequence[float], *, tokens_per_point: int = 100, tokens_per_second: float = 50.0
) -> LearningCurve:
    """Make a learning curve with evenly spaced points."""
    tokens = [tokens_per_point * n for n in range(1, len(values) + 1)]
    steps = list(range(1, len(values) + 1))
    return LearningCurve(
        steps, tokens, [n / tokens_per_second for n in tokens], list(values), tokens_per_second
    )


def make_variant_result(name: str, losses: Sequence[float], **curve_options: Any) -> VariantResult:
    """Make a variant with one run per loss; each curve falls from 4 to that loss."""
    run_results = [
        RunResult(
            seed, f"{name}{seed}", loss, make_curve([4.0, (4.0 + loss) / 2, loss], **curve_options)
        )
        for seed, loss in enumerate(losses)
    ]
    return VariantResult(name, {"dropout": (0.0, 0.1)}, 1000, 3, 300, run_results)


def make_diverged_variant(name: str) -> VariantResult:
    """Make a variant that diverged with its first seed."""
    return VariantResult(
        name, {}, 1000, 3, 300, [RunResult(0, name, float("inf"), None)], closed=True
    )


def make_comparison_record(*variants: VariantResult, **options: Any) -> ComparisonRecord:
    """Make a comparison of these variants."""
    fields = {"level": 0.05, "sequential": False, "machine": "a machine", **options}
    fields = {"judged_on": "held back", "held_back_bytes": 1234, **fields}
    return ComparisonRecord("mine", "300tokens", "my-text", variants=list(variants), **fields)


class CompareRecorder(CompareCallback):
    """Records the events of a comparison."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, int]] = []
        self.counts: list[list[int]] = []

    def on_variant_begin(self, variant: str, seed: int, steps: int, done: int, total: int) -> None:
        self.trained.append((variant, seed))

    def on_variant_end(self, record: ComparisonRecord) -> None:
        self.counts.append([len(result.trainings) for result in record.variants])


def run_comparison(tiny: Config, *callbacks: CompareCallback, **options: Any) -> ComparisonRecord:
    """Compare two learning rates of the tiny model on words.txt."""
    config = override_config(tiny, {"source": "words.txt", "dropout": 0.0})
    if "vary" not in options and "variants" not in options:
        options["vary"] = "learning_rate=1e-2,1e-3"
    variants = options.pop("variants", ())
    if not variants:
        options["config"] = config
    settings = {"budget": "12steps", "name": "mine", **options}
    return api.compare(*variants, callbacks=callbacks, **settings)


LAW = ScalingLaw(limit=0.5, a=0.1, alpha=0.35, b=0.35, beta=0.4)


def make_scaling_record(test_error: float = 0.0) -> ScalingRecord:
    """Make a scaling study whose losses follow LAW, except for the test's by `test_error`."""
    sizes = [ModelSize(n, 64 * n, 500_000 * n, 0.1 * n) for n in range(1, 6)]

    def result(size: ModelSize, steps: int, error: float = 0.0) -> LengthResult:
        tokens = 2048 * steps
        loss = LAW.predict(size.parameters, tokens) + error
        return LengthResult(size, steps, tokens, [loss - 0.001, loss, loss + 0.001])

    fitted = [result(size, steps) for size in sizes[:4] for steps in (100, 300, 900)]
    fit = fit_scaling_law([r.point for r in fitted])
    advice = [SizeAdvice(5.0, sizes[1], 3_000_000, epochs, 0.9, 0.8, 1.0) for epochs in (0.5, 5.0)]
    return ScalingRecord(
        "law", "2h", "modern", "my-text", 1_000_000, 1234, "a machine", fitted,
        result(sizes[4], 900, test_error), fit, advice,
    )  # fmt: skip
