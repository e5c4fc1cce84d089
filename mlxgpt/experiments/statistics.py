"""Differences between two variants that were trained with the same seeds: Student's paired t, and
Holm's correction where several are looked at.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 0.05  # how often chance alone may be taken for a difference
MOST_MORE = 20  # seeds that one would still add to be certain


@dataclass(frozen=True)
class Difference:
    """How far a variant's results lie from the first one's: below 0, it is better.

    Attributes:
        mean: over the seeds.
        low, high: the interval that holds the true difference; None from one seed.
        p: how often chance alone makes one as large, after Holm's correction; None from one seed.
        more: about how many seeds more would decide, if the difference stays what it seems; 0 where
            it is decided, None where they would be more than 20.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    more: int | None


def differences(all_pairs: Sequence[Sequence[float]], level: float = ALPHA) -> list[Difference]:
    """The difference of each of several variants from the first one.

    Args:
        all_pairs: for each variant, its result minus the first one's, for each seed.
        level: how often an interval may miss: 0.05 for 95 %.
    """
    adjusted = holm([p_value(pairs) for pairs in all_pairs])
    return [
        Difference(
            statistics.fmean(pairs), *interval(pairs, level), p, seeds_more(pairs, len(all_pairs))
        )
        for pairs, p in zip(all_pairs, adjusted, strict=True)
    ]


def interval(pairs: Sequence[float], level: float) -> tuple[float | None, float | None]:
    """The mean's interval by Student's t; (None, None) of fewer than two."""
    if len(pairs) < 2:
        return None, None
    mean, error = statistics.fmean(pairs), _standard_error(pairs)
    width = t_quantile(level, len(pairs) - 1) * error
    return mean - width, mean + width


def p_value(pairs: Sequence[float]) -> float | None:
    """How often a mean as far from 0 would come of pairs that scatter around it (two-sided)."""
    if len(pairs) < 2:
        return None
    mean, error = statistics.fmean(pairs), _standard_error(pairs)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(two_sided(mean / error, len(pairs) - 1))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number (Holm, 1979): with the smallest, all of them count, with
    the next, all but one, …; none is below one before it.
    """
    known = sorted((p, n) for n, p in enumerate(values) if p is not None)
    result: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (p, n) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        result[n] = highest
    return result


def seeds_more(pairs: Sequence[float], comparisons: int) -> int | None:
    """How many seeds more would take the interval off 0, the strictest of Holm's levels taken, if
    mean and scatter stay as they are.
    """
    if len(pairs) < 2:
        return None
    mean, scatter = abs(statistics.fmean(pairs)), statistics.stdev(pairs)
    for more in range(MOST_MORE + 1):
        count = len(pairs) + more
        if mean > t_quantile(ALPHA / comparisons, count - 1) * scatter / math.sqrt(count):
            return more
    return None


def two_sided(t: float | np.ndarray, freedom: int) -> np.ndarray:
    """The probability of a Student's t at least as far from 0, for whole degrees of freedom, by
    the finite sums of Abramowitz & Stegun, 26.7.3 and 26.7.4.
    """
    angle = np.arctan(np.abs(t) / math.sqrt(freedom))
    sine, cosine = np.sin(angle), np.cos(angle)
    odd = freedom % 2
    term = cosine if odd else np.ones_like(cosine)
    total = term if freedom > 1 else np.zeros_like(term)
    for n in range(2 + odd, freedom, 2):
        term = term * cosine**2 * (n - 1) / n
        total = total + term
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return np.clip(1 - within, 0.0, 1.0)


@functools.cache
def t_quantile(level: float, freedom: int) -> float:
    """The t that is exceeded, on either side, with probability `level`."""
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if two_sided(math.sqrt(freedom) * math.tan(middle), freedom) > level:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _standard_error(pairs: Sequence[float]) -> float:
    return statistics.stdev(pairs) / math.sqrt(len(pairs))
