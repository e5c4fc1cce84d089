from __future__ import annotations

import numpy as np
import pytest

from mlxgpt.experiments.sequential import (
    MAX_SEEDS,
    MIN_SEEDS,
    is_decided,
    min_p_over_looks,
    per_look_alpha,
)
from mlxgpt.experiments.statistics import ALPHA, confidence_interval, p_value


def test_the_false_positive_rate_over_all_looks_is_5_percent() -> None:
    """With different random values than the level was computed from; benchmarks/false_alarms.py
    tests the whole procedure.
    """
    null_deltas = np.random.default_rng(1).normal(size=(20_000, MAX_SEEDS))
    share = np.mean(min_p_over_looks(null_deltas, MIN_SEEDS) < per_look_alpha(1, MAX_SEEDS))
    assert 0.043 < share < 0.054
    naive = np.mean(min_p_over_looks(null_deltas, MIN_SEEDS) < ALPHA)
    assert naive > 0.2, "looking often at 95 % would be wrong often"


def test_more_looks_and_more_variants_lower_the_level() -> None:
    assert (
        ALPHA
        > per_look_alpha(1, 5)
        > per_look_alpha(1, MAX_SEEDS)
        > per_look_alpha(3, MAX_SEEDS)
        > 0.0005
    )
    assert per_look_alpha(1, MIN_SEEDS) == pytest.approx(ALPHA, rel=0.05), (
        "a single check is not corrected"
    )


def test_min_p_over_looks_matches_p_value() -> None:
    pairs = np.random.default_rng(2).normal(0.8, 1.0, size=(5, 9))
    for row, actual in zip(pairs, min_p_over_looks(pairs, 4), strict=True):
        p_values = [p_value(list(row[:n])) for n in range(4, 10)]
        assert actual == pytest.approx(min(p for p in p_values if p is not None))


def test_is_decided() -> None:
    clear, near, wide = [-0.1, -0.11, -0.1], [0.001, -0.001, 0.0], [0.1, -0.1, 0.0]
    alpha = per_look_alpha(1, MAX_SEEDS)
    assert is_decided(clear, alpha, 0.0)
    assert not is_decided(clear[:2], alpha, 0.0), "never before three seeds"
    assert not is_decided(near, alpha, 0.0)
    low, high = confidence_interval(near, alpha)
    assert low is not None
    assert high is not None
    assert is_decided(near, alpha, 1.01 * (high - low) / 2)
    assert not is_decided(near, alpha, 0.99 * (high - low) / 2)
    assert not is_decided(wide, alpha, 0.005)
