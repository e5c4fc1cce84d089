"""Looking after each seed whether it is decided, without being fooled by looking often.

Whoever looks at a 95 % interval after each of 18 seeds, and stops when it leaves 0, finds a
difference between twins far more often than 5 times in 100. So the intervals are wider: of that
level at which, over all looks together, it happens 5 times in 100. Student's t does not depend on
how large the scatter is, so the level can be found by simulating once (Pocock's boundary, 1977,
for t). benchmarks/false_alarms.py measures what the whole rule does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from mlxgpt.experiments.statistics import ALPHA, interval, two_sided

FIRST = 3  # seeds before the first look
MOST = 20  # seeds after which it stays undecided
SIMULATED = 100_000


@functools.cache
def level(comparisons: int, most: int, first: int = FIRST) -> float:
    """The level of each look's interval, so that among so many comparisons chance alone is taken
    for a difference in at most 5 of 100 (Bonferroni's correction among them).
    """
    alpha = ALPHA / comparisons
    smallest = smallest_p(np.random.default_rng(0).normal(size=(SIMULATED, most)), first)
    # Two standard errors of the simulation to the safe side.
    return float(np.quantile(smallest, max(0.0, alpha - 2 * math.sqrt(alpha / SIMULATED))))


def smallest_p(pairs: np.ndarray, first: int) -> np.ndarray:
    """For each row of pairs[N, n], the smallest p of all looks after `first` seeds and more."""
    counts = np.arange(1, pairs.shape[1] + 1)
    means = np.cumsum(pairs, axis=1) / counts
    squares = np.cumsum(pairs**2, axis=1)
    result = np.ones(len(pairs))
    for n in range(first, pairs.shape[1] + 1):
        mean = means[:, n - 1]
        variance = (squares[:, n - 1] - n * mean**2) / (n - 1)
        result = np.minimum(result, two_sided(mean / np.sqrt(variance / n), n - 1))
    return result


def is_decided(pairs: Sequence[float], level: float, smallest: float) -> bool:
    """Whether no more seeds are needed: the interval has left 0, or reaches less than `smallest`
    to either side of its middle.
    """
    low, high = interval(pairs, level)
    if low is None or high is None or len(pairs) < FIRST:
        return False
    return not low <= 0 <= high or (high - low) / 2 < smallest
