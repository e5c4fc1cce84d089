"""Results and curves made up, and a small comparison, for tests of what is done with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxgpt import api
from mlxgpt.config import Config, override_config
from mlxgpt.experiments.curves import LearningCurve
from mlxgpt.experiments.results import ComparisonRecord, RunResult, VariantResult
from mlxgpt.experiments.runner import CompareCallback


def curve(values: Sequence[float], *, each: int = 100, rate: float = 50.0) -> LearningCurve:
    """A curve with a point each so many tokens."""
    tokens = [each * n for n in range(1, len(values) + 1)]
    steps = list(range(1, len(values) + 1))
    return LearningCurve(steps, tokens, [n / rate for n in tokens], list(values), rate)


def variant_result(name: str, results: Sequence[float], **given: Any) -> VariantResult:
    """A variant with a training for each result, whose curve goes down to it from 4."""
    trainings = [
        RunResult(seed, f"{name}{seed}", value, curve([4.0, (4.0 + value) / 2, value], **given))
        for seed, value in enumerate(results)
    ]
    return VariantResult(name, {"dropout": (0.0, 0.1)}, 1000, 3, 300, trainings)


def diverged(name: str) -> VariantResult:
    """A variant that diverged with its first seed."""
    return VariantResult(
        name, {}, 1000, 3, 300, [RunResult(0, name, float("inf"), None)], closed=True
    )


def record(*variants: VariantResult, **given: Any) -> ComparisonRecord:
    """A comparison of these."""
    values = {"level": 0.05, "sequential": False, "machine": "a machine", **given}
    values = {"judged_on": "held back", "held_back_bytes": 1234, **values}
    return ComparisonRecord("mine", "300tokens", "my-text", variants=list(variants), **values)


class Recorder(CompareCallback):
    """Remembers the events of a comparison."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, int]] = []
        self.counts: list[list[int]] = []

    def on_variant_begin(self, variant: str, seed: int, steps: int, done: int, total: int) -> None:
        self.trained.append((variant, seed))

    def on_variant_end(self, record: ComparisonRecord) -> None:
        self.counts.append([len(result.trainings) for result in record.variants])


def compared(tiny: Config, *callbacks: CompareCallback, **given: Any) -> ComparisonRecord:
    """A comparison of two learning rates of the tiny model, on words.txt."""
    config = override_config(tiny, {"source": "words.txt", "dropout": 0.0})
    if "vary" not in given and "variants" not in given:
        given["vary"] = "learning_rate=1e-2,1e-3"
    variants = given.pop("variants", ())
    if not variants:
        given["config"] = config
    values = {"budget": "12steps", "name": "mine", **given}
    return api.compare(*variants, callbacks=callbacks, **values)
