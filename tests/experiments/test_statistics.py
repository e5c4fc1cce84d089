"""Student's t and Holm's correction, compared with published tables and exact formulas."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.experiments.statistics import (
    MAX_ADDITIONAL_SEEDS,
    compute_paired_differences,
    confidence_interval,
    estimate_additional_seeds,
    holm_correction,
    p_value,
    t_quantile,
    two_sided_p_value,
)


@pytest.mark.parametrize(
    ("freedom", "five", "one"),
    [  # published tables of Student's t: two-sided 5% and 1%
        (1, 12.706, 63.657),
        (2, 4.303, 9.925),
        (3, 3.182, 5.841),
        (4, 2.776, 4.604),
        (9, 2.262, 3.250),
        (10, 2.228, 3.169),
        (19, 2.093, 2.861),
        (30, 2.042, 2.750),
    ],
)
def test_t_quantiles_match_published_tables(freedom: int, five: float, one: float) -> None:
    assert t_quantile(0.05, freedom) == pytest.approx(five, abs=6e-4)
    assert t_quantile(0.01, freedom) == pytest.approx(one, abs=6e-4)


def test_one_and_two_degrees_of_freedom_match_closed_forms() -> None:
    t = np.array([-3.0, 0.0, 0.5, 2.0, 100.0])
    np.testing.assert_allclose(
        two_sided_p_value(t, 1), 1 - 2 / math.pi * np.arctan(abs(t)), atol=1e-15
    )
    np.testing.assert_allclose(two_sided_p_value(t, 2), 1 - abs(t) / np.sqrt(2 + t**2), atol=1e-15)


def test_many_degrees_of_freedom_approach_the_normal_distribution() -> None:
    for t in (0.5, 1.0, 1.96, 3.0):
        exact = 2 * statistics.NormalDist().cdf(-t)
        assert two_sided_p_value(t, 10_000) == pytest.approx(exact, rel=1e-2)


@given(st.floats(0.001, 0.999), st.integers(1, 60))
def test_a_quantile_has_its_probability(level: float, freedom: int) -> None:
    assert two_sided_p_value(t_quantile(level, freedom), freedom) == pytest.approx(level, abs=1e-9)


def test_confidence_interval_of_three_seeds() -> None:
    pairs = [-0.02, -0.03, -0.01]
    low, high = confidence_interval(pairs, 0.05)
    error = 0.01 / math.sqrt(3)
    assert (low, high) == pytest.approx((-0.02 - 4.3027 * error, -0.02 + 4.3027 * error), abs=1e-6)
    t = 0.02 / error
    assert p_value(pairs) == pytest.approx(1 - t / math.sqrt(2 + t**2))


def test_one_seed_gives_no_interval_or_p_value() -> None:
    assert confidence_interval([0.3], 0.05) == (None, None)
    assert p_value([0.3]) is None
    assert estimate_additional_seeds([0.3], 1) is None


def test_constant_differences() -> None:
    assert (confidence_interval([0.0, 0.0], 0.05), p_value([0.0, 0.0])) == ((0.0, 0.0), 1.0)
    assert (confidence_interval([0.1, 0.1], 0.05), p_value([0.1, 0.1])) == ((0.1, 0.1), 0.0)


def test_holm_correction_of_a_textbook_example() -> None:
    """Sorted: 0.005 × 4, 0.01 × 3, 0.03 × 2 and 0.04 × 1, which is raised to the one before it."""
    assert holm_correction([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_correction([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm_correction([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm_correction([None, 0.04]) == [None, pytest.approx(0.04)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_lies_between_uncorrected_and_bonferroni(values: list[float]) -> None:
    for p, corrected in zip(values, holm_correction(values), strict=True):
        assert corrected is not None
        assert p <= corrected <= min(1.0, p * len(values)) + 1e-12
    order = np.argsort(values, kind="stable")
    corrected_in_order = [holm_correction(values)[n] for n in order]
    assert corrected_in_order == sorted(corrected_in_order)


def test_the_estimated_additional_seeds_would_decide() -> None:
    """With this many more seeds of the same mean and deviation; one fewer is not enough."""
    pairs = [-0.03, 0.01, -0.02]
    more = estimate_additional_seeds(pairs, 1)
    assert more is not None
    assert more > 0
    mean, scatter = abs(statistics.fmean(pairs)), statistics.stdev(pairs)

    def excludes_zero(count: int) -> bool:
        return mean > t_quantile(0.05, count - 1) * scatter / math.sqrt(count)

    assert excludes_zero(3 + more)
    assert not excludes_zero(3 + more - 1)
    assert estimate_additional_seeds([0.03, -0.03, 0.001], 1) is None, (
        f"more than {MAX_ADDITIONAL_SEEDS}"
    )
    assert estimate_additional_seeds([-0.03, -0.0301, -0.0299], 1) == 0
    strict = estimate_additional_seeds(pairs, 4)
    assert strict is not None
    assert strict > more, "among four, each is held to a stricter level"


def test_several_variants_are_corrected_together() -> None:
    near, far = [-0.02, -0.03, -0.022], [0.5, 0.51, 0.49]
    near_alone = compute_paired_differences([near])[0]
    near_of_two, far_of_two = compute_paired_differences([near, far])
    assert near_alone.p == p_value(near)
    assert near_of_two.p == pytest.approx(near_alone.p), "the larger p of two counts alone"
    assert far_of_two.p == pytest.approx(2 * p_value(far))  # type: ignore[operator]
    assert (near_of_two.low, near_of_two.high) == (near_alone.low, near_alone.high)
    assert near_of_two.mean == pytest.approx(-0.024)
