"""Learning curves of runs, and the speedup of one run over another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxgpt.experiments.statistics import ALPHA, confidence_interval
from mlxgpt.storage.run import Run


@dataclass(frozen=True)
class LearningCurve:
    """Bits per byte at each evaluation of a run.

    Attributes:
        steps, tokens, seconds: of training until the evaluation; seconds exclude evaluation,
            checkpoints and compilation.
        bits_per_byte: on the held-out data.
        tokens_per_second: median over all log intervals.
    """

    steps: list[int]
    tokens: list[int]
    seconds: list[float]
    bits_per_byte: list[float]
    tokens_per_second: float

    @property
    def final_bits_per_byte(self) -> float:
        """Bits per byte at the last evaluation; infinite if the loss was not finite."""
        return self.bits_per_byte[-1]


@dataclass(frozen=True)
class Speedup:
    """Speedup of a variant in reaching the baseline's final loss; below 1 if it is slower.

    Attributes:
        ratio: geometric mean over the seeds.
        low, high: 95% confidence interval; None with one seed.
    """

    ratio: float
    low: float | None
    high: float | None


def build_learning_curve(run: Run) -> LearningCurve:
    """Build the learning curve of a run from its metrics."""
    tokens_per_step = run.tokens_per_step
    records = list(run.metrics())
    rates = [record["tokens_per_second"] for record in records]
    median_rate = statistics.median([rate for rate in rates if rate] or [math.nan])
    # The first interval includes compilation, and some records have no speed.
    rates = [median_rate, *(rate or median_rate for rate in rates[1:])]
    learning_curve = LearningCurve([], [], [], [], median_rate)
    step, seconds = 0, 0.0
    for record, rate in zip(records, rates, strict=True):
        seconds += (record["step"] - step) * tokens_per_step / rate
        step = record["step"]
        if "val_bits_per_byte" in record:
            value = record["val_bits_per_byte"]
            learning_curve.steps.append(step)
            learning_curve.tokens.append(step * tokens_per_step)
            learning_curve.seconds.append(seconds)
            learning_curve.bits_per_byte.append(math.inf if value is None else value)
    return learning_curve


def compute_speedup(
    curve_pairs: Sequence[tuple[LearningCurve, LearningCurve]], axis: str
) -> Speedup | None:
    """Mean speedup of a candidate in reaching the baseline's final loss. For a seed where it never
    reaches that loss, the inverse of the baseline's speedup to the candidate's final loss counts.

    Args:
        curve_pairs: (baseline's curve, candidate's curve) for each seed.
        axis: `tokens` or `seconds`.

    Returns:
        None if the ratio is unknown for any seed.
    """
    log_ratios = []
    for baseline, candidate in curve_pairs:
        ratio = _speedup_ratio(baseline, candidate, axis)
        if ratio is None or math.isnan(ratio):  # NaN: no measured speed
            return None
        log_ratios.append(math.log(ratio))
    if not log_ratios:
        return None
    low, high = confidence_interval(log_ratios, ALPHA)
    return Speedup(
        math.exp(statistics.fmean(log_ratios)),
        None if low is None else math.exp(low),
        None if high is None else math.exp(high),
    )


def _speedup_ratio(baseline: LearningCurve, candidate: LearningCurve, axis: str) -> float | None:
    crossing = _interpolate_crossing(candidate, baseline.final_bits_per_byte, axis)
    if crossing is not None:
        return getattr(baseline, axis)[-1] / crossing
    crossing = _interpolate_crossing(baseline, candidate.final_bits_per_byte, axis)
    return None if crossing is None else crossing / getattr(candidate, axis)[-1]


def _interpolate_crossing(learning_curve: LearningCurve, value: float, axis: str) -> float | None:
    """Where a curve first falls to `value`, with linear interpolation; None if it does not."""
    positions, values = getattr(learning_curve, axis), learning_curve.bits_per_byte
    first_below = next((n for n, v in enumerate(values) if v <= value), None)
    if first_below is None:
        return None
    if first_below == 0:
        # A curve that starts below the value crossed it before the first evaluation.
        return positions[0] if values[0] == value else None
    segment = slice(first_below - 1, first_below + 1)
    if math.isinf(values[first_below - 1]):
        return positions[first_below]
    return float(np.interp(value, values[segment][::-1], positions[segment][::-1]))
