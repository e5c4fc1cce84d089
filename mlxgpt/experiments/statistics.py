"""Paired t-test for variants trained with the same seeds, and Holm's correction for several."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 0.05  # significance level


@dataclass(frozen=True)
class PairedDifference:
    """Difference between the results of a variant and the baseline; negative is better.

    Attributes:
        mean: over the seeds.
        low, high: confidence interval; None with one seed.
        p: p-value after Holm's correction; None with one seed.
        more: estimated number of additional seeds for a decision; 0 if decided, None with one seed
            or if it is more than 20.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    more: int | None


def compute_paired_differences(
    all_deltas: Sequence[Sequence[float]], alpha: float = ALPHA
) -> list[PairedDifference]:
    """Differences of several variants from the baseline.

    Args:
        all_deltas: for each variant, its result minus the baseline's, for each seed.
        alpha: significance level of the intervals: 0.05 for 95%.
    """
    adjusted_p_values = holm_correction([p_value(deltas) for deltas in all_deltas])
    return [
        PairedDifference(
            statistics.fmean(deltas),
            *confidence_interval(deltas, alpha),
            p,
            estimate_additional_seeds(deltas, len(all_deltas)),
        )
        for deltas, p in zip(all_deltas, adjusted_p_values, strict=True)
    ]


def confidence_interval(deltas: Sequence[float], alpha: float) -> tuple[float | None, float | None]:
    """Confidence interval of the mean by Student's t; (None, None) for fewer than two deltas."""
    if len(deltas) < 2:
        return None, None
    mean, std_error = statistics.fmean(deltas), _standard_error(deltas)
    margin = t_quantile(alpha, len(deltas) - 1) * std_error
    return mean - margin, mean + margin


def p_value(deltas: Sequence[float]) -> float | None:
    """Two-sided p-value of the mean against 0; None for fewer than two deltas."""
    if len(deltas) < 2:
        return None
    mean, std_error = statistics.fmean(deltas), _standard_error(deltas)
    if std_error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(two_sided_p_value(mean / std_error, len(deltas) - 1))


def holm_correction(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values with Holm's correction (1979): the smallest is multiplied by their number, the next
    by one less, and so on, without ever decreasing.
    """
    ranked = sorted((p, n) for n, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running_max = 0.0
    for rank, (p, n) in enumerate(ranked):
        running_max = max(running_max, min(1.0, p * (len(ranked) - rank)))
        adjusted[n] = running_max
    return adjusted


MAX_ADDITIONAL_SEEDS = 20  # higher numbers are not estimated


def estimate_additional_seeds(deltas: Sequence[float], comparisons: int) -> int | None:
    """Estimated number of additional seeds until the interval excludes 0 at the strictest of Holm's
    levels, if mean and standard deviation stay the same; None if above MAX_ADDITIONAL_SEEDS.
    """
    if len(deltas) < 2:
        return None
    mean, stdev = abs(statistics.fmean(deltas)), statistics.stdev(deltas)
    for additional in range(MAX_ADDITIONAL_SEEDS + 1):
        n = len(deltas) + additional
        if mean > t_quantile(ALPHA / comparisons, n - 1) * stdev / math.sqrt(n):
            return additional
    return None


def two_sided_p_value(t: float | np.ndarray, df: int) -> np.ndarray:
    """Two-sided p-value of Student's t with `df` degrees of freedom, by the finite sums of
    Abramowitz & Stegun, 26.7.3 and 26.7.4.
    """
    angle = np.arctan(np.abs(t) / math.sqrt(df))
    sine, cosine = np.sin(angle), np.cos(angle)
    odd = df % 2
    term = cosine if odd else np.ones_like(cosine)
    total = term if df > 1 else np.zeros_like(term)
    for n in range(2 + odd, df, 2):
        term = term * cosine**2 * (n - 1) / n
        total = total + term
    central_probability = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return np.clip(1 - central_probability, 0.0, 1.0)


@functools.cache
def t_quantile(alpha: float, df: int) -> float:
    """Two-sided critical value of Student's t: |t| exceeds it with probability `alpha`."""
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if two_sided_p_value(math.sqrt(df) * math.tan(middle), df) > alpha:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan(low)


def _standard_error(deltas: Sequence[float]) -> float:
    return statistics.stdev(deltas) / math.sqrt(len(deltas))
