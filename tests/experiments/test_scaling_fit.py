from __future__ import annotations

import math

import numpy as np
import pytest

from mlxgpt.experiments.scaling_fit import (
    ScalingPoint,
    best_tokens_per_parameter,
    fit_scaling_law,
)
from mlxgpt.training.scaling_law import ScalingLaw

SIZES = (500_000, 1_200_000, 1_900_000, 2_800_000)
LENGTHS = (400_000, 1_200_000, 3_600_000)


def make_points(law: ScalingLaw, noise: float = 0.0, seed: int = 0) -> list[ScalingPoint]:
    rng = np.random.default_rng(seed)
    return [
        ScalingPoint(size, length, law.predict(size, length) + rng.normal(0, noise))
        for size in SIZES
        for length in LENGTHS
    ]


LAW = ScalingLaw(limit=0.5, a=0.1, alpha=0.35, b=0.35, beta=0.4)


def test_the_law_is_recovered_from_exact_losses() -> None:
    fit = fit_scaling_law(make_points(LAW))
    assert fit.residual < 1e-3
    for size, length in ((4_000_000, 3_600_000), (300_000, 10_000_000)):
        assert fit.law.predict(size, length) == pytest.approx(LAW.predict(size, length), abs=2e-3)


def test_the_interval_contains_a_new_measurement_as_often_as_it_says() -> None:
    noise, size, length = 0.003, 4_000_000, 3_600_000
    hits = 0
    for seed in range(20):
        low, high = fit_scaling_law(make_points(LAW, noise, seed)).interval(size, length)
        measured = LAW.predict(size, length) + np.random.default_rng(1000 + seed).normal(0, noise)
        hits += low <= measured <= high
        assert high - low < 0.05
    assert hits >= 17  # 19 are expected; fewer than 17 in 1.6% of all draws


def test_the_errors_contain_the_law() -> None:
    errors = fit_scaling_law(make_points(LAW, 0.002)).errors()
    for name, (low, high) in errors.items():
        assert low <= getattr(LAW, name) <= high, name
        assert low < high


def test_a_loss_that_does_not_depend_on_the_size() -> None:
    fit = fit_scaling_law(make_points(ScalingLaw(0.5, 0.0, 0.3, 0.35, 0.4)))
    assert fit.law.predict(1e6, 1e6) == pytest.approx(fit.law.predict(1e8, 1e6), abs=2e-3)
    assert fit.law.a * 1e6**-fit.law.alpha < 1e-2


@pytest.mark.parametrize("flops", [1e13, 1e15])
def test_tokens_per_parameter_are_where_the_loss_is_lowest(flops: float) -> None:
    parameters = np.geomspace(1e3, 1e9, 200_001)
    losses = [LAW.predict(n, flops / 6 / n) for n in parameters]
    best = parameters[int(np.argmin(losses))]
    assert best_tokens_per_parameter(LAW, flops) == pytest.approx(flops / 6 / best**2, rel=1e-3)
    ratio, low, high = fit_scaling_law(make_points(LAW, 0.001)).tokens_per_parameter(flops)
    assert low < ratio < high


def test_no_ratio_without_both_terms() -> None:
    assert math.isnan(best_tokens_per_parameter(ScalingLaw(1.0, 0.0, 1.0, 1.0, 1.0), 1e13))


@pytest.mark.parametrize("losses", [[1.0] * 5, [1.0] * 5 + [math.inf]])
def test_too_few_losses_are_refused(losses: list[float]) -> None:
    points = [ScalingPoint(10**6, 10**6 * n, loss) for n, loss in enumerate(losses, 1)]
    with pytest.raises(ValueError, match="finite losses"):
        fit_scaling_law(points)
