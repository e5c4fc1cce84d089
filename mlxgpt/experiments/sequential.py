"""Sequential testing: check after each seed whether a comparison is decided, at a corrected level.

Checking a 95% interval after each of 18 seeds, and stopping when it excludes 0, finds a difference
between identical variants far more often than 5% of the time. The intervals are therefore wider,
with the level at which the false positive rate over all looks is 5%. Student's t does not depend on
the variance, so that this level can be simulated once (Pocock's boundary, 1977, for t).
benchmarks/false_alarms.py measures the false positive rate of the whole procedure.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from mlxgpt.experiments.statistics import ALPHA, confidence_interval, two_sided_p_value

MIN_SEEDS = 3  # seeds before the first look
MAX_SEEDS = 20  # seeds after which testing stops, even if undecided
SIMULATIONS = 100_000  # simulated comparisons


@functools.cache
def per_look_alpha(comparisons: int, max_seeds: int, min_seeds: int = MIN_SEEDS) -> float:
    """Significance level of each look, for a false positive rate of at most 5% over all looks and
    comparisons (with Bonferroni's correction for the comparisons).
    """
    alpha = ALPHA / comparisons
    deltas = np.random.default_rng(0).normal(size=(SIMULATIONS, max_seeds))
    min_p_values = min_p_over_looks(deltas, min_seeds)
    # Lower by two standard errors of the simulation, to be conservative.
    return float(np.quantile(min_p_values, max(0.0, alpha - 2 * math.sqrt(alpha / SIMULATIONS))))


def min_p_over_looks(deltas: np.ndarray, min_seeds: int) -> np.ndarray:
    """Smallest p-value over all looks from `min_seeds` seeds on: deltas [N, seeds] -> [N]."""
    counts = np.arange(1, deltas.shape[1] + 1)
    means = np.cumsum(deltas, axis=1) / counts
    squares = np.cumsum(deltas**2, axis=1)
    min_p_values = np.ones(len(deltas))
    for n in range(min_seeds, deltas.shape[1] + 1):
        mean = means[:, n - 1]
        variance = (squares[:, n - 1] - n * mean**2) / (n - 1)
        p_values = two_sided_p_value(mean / np.sqrt(variance / n), n - 1)
        min_p_values = np.minimum(min_p_values, p_values)
    return min_p_values


def is_decided(deltas: Sequence[float], alpha: float, min_effect: float) -> bool:
    """Whether no more seeds are needed: the interval excludes 0, or its half-width is below
    `min_effect`.
    """
    low, high = confidence_interval(deltas, alpha)
    if low is None or high is None or len(deltas) < MIN_SEEDS:
        return False
    return not low <= 0 <= high or (high - low) / 2 < min_effect
