"""Sequential testing: looks after each seed whether it is decided, at a level corrected for that.

Looking at a 95 % interval after each of 18 seeds, and stopping when it leaves 0, finds a difference
between twins far more often than 5 times in 100. So the intervals are wider: of that
level at which, over all looks together, it happens 5 times in 100. Student's t does not depend on
how large the scatter is, so the level can be found by simulating once (Pocock's boundary, 1977,
for t). benchmarks/false_alarms.py measures what the whole rule does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from mlxgpt.experiments.statistics import ALPHA, confidence_interval, two_sided_p_value

MIN_SEEDS = 3  # seeds before the first look
MAX_SEEDS = 20  # seeds after which it stays undecided
SIMULATIONS = 100_000  # simulated comparisons


@functools.cache
def per_look_alpha(comparisons: int, max_seeds: int, min_seeds: int = MIN_SEEDS) -> float:
    """Significance level of each look, such that over all looks and comparisons the false positive
    rate is at most 5% (Bonferroni's correction between comparisons).
    """
    alpha = ALPHA / comparisons
    deltas = np.random.default_rng(0).normal(size=(SIMULATIONS, max_seeds))
    min_p_values = min_p_over_looks(deltas, min_seeds)
    # Two standard errors of the simulation to the safe side.
    return float(np.quantile(min_p_values, max(0.0, alpha - 2 * math.sqrt(alpha / SIMULATIONS))))


def min_p_over_looks(deltas: np.ndarray, min_seeds: int) -> np.ndarray:
    """For each row of deltas[N, n], the smallest p of all looks from `min_seeds` seeds on."""
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
    """Whether no more seeds are needed: the interval has left 0, or reaches less than `min_effect`
    to either side of its middle.
    """
    low, high = confidence_interval(deltas, alpha)
    if low is None or high is None or len(deltas) < MIN_SEEDS:
        return False
    return not low <= 0 <= high or (high - low) / 2 < min_effect
