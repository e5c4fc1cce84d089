"""Learning curves of trainings, and how much sooner one reaches what another ends with."""

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
    """Bits per byte at each evaluation of a training.

    Attributes:
        steps, tokens, seconds: of training until then; evaluating, saving and compiling take time
            too, and are not counted.
        bits_per_byte: on the text that it is judged by.
        tokens_per_second: the median of all intervals.
    """

    steps: list[int]
    tokens: list[int]
    seconds: list[float]
    bits_per_byte: list[float]
    tokens_per_second: float

    @property
    def final_bits_per_byte(self) -> float:
        """Bits per byte at its end; infinite where the loss was not finite."""
        return self.bits_per_byte[-1]


@dataclass(frozen=True)
class Speedup:
    """How many times sooner a variant is where the first one ends; below 1, how much later.

    Attributes:
        ratio: the geometric mean over the seeds.
        low, high: its 95 % interval; None from one seed.
    """

    ratio: float
    low: float | None
    high: float | None


def build_learning_curve(run: Run) -> LearningCurve:
    """The curve of a training, from its metrics."""
    tokens_per_step = run.config.tokens_per_step
    records = list(run.metrics())
    rates = [record["tokens_per_second"] for record in records]
    median_rate = statistics.median([rate for rate in rates if rate] or [math.nan])
    # The first interval includes compiling, and one that was logged later has no speed.
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
    """How many times sooner the other reaches what the first ends with, seed by seed; where it
    never does, how many times sooner the first reaches what the other ends with, turned round.

    Args:
        curve_pairs: of each seed, the first's curve and the other's.
        axis: `tokens` or `seconds`.

    Returns:
        None where a pair of curves does not tell.
    """
    log_ratios = []
    for baseline, candidate in curve_pairs:
        ratio = _speedup_ratio(baseline, candidate, axis)
        if ratio is None or math.isnan(ratio):  # NaN: of a training without a measured speed
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
    """Where a curve first comes down to a value, straight lines drawn between its points."""
    positions, values = getattr(learning_curve, axis), learning_curve.bits_per_byte
    first_below = next((n for n, v in enumerate(values) if v <= value), None)
    if first_below is None:
        return None
    if first_below == 0:
        # Where it starts below the value, it crossed before its first evaluation.
        return positions[0] if values[0] == value else None
    segment = slice(first_below - 1, first_below + 1)
    if math.isinf(values[first_below - 1]):
        return positions[first_below]
    return float(np.interp(value, values[segment][::-1], positions[segment][::-1]))
