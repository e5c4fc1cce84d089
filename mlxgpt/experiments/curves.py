"""What a training reached, when: its curve; and how much sooner another one reaches the same."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxgpt.experiments.statistics import ALPHA, interval
from mlxgpt.storage.run import Run


@dataclass(frozen=True)
class Curve:
    """What was seen at each evaluation.

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
    def last(self) -> float:
        """What it ended with; infinite where that is no number."""
        return self.bits_per_byte[-1]


@dataclass(frozen=True)
class SpeedUp:
    """How many times sooner a variant is where the first one ends; below 1, how much later.

    Attributes:
        ratio: the geometric mean over the seeds.
        low, high: its 95 % interval; None from one seed.
    """

    ratio: float
    low: float | None
    high: float | None


def curve(run: Run) -> Curve:
    """The curve of a training, from its metrics."""
    each = run.config.tokens_per_step
    records = list(run.metrics())
    rates = [record["tokens_per_second"] for record in records]
    median = statistics.median([rate for rate in rates if rate] or [math.nan])
    # In the first interval kernels were compiled, and one that was made up for has no time.
    rates = [median, *(rate or median for rate in rates[1:])]
    seen = Curve([], [], [], [], median)
    step, seconds = 0, 0.0
    for record, rate in zip(records, rates, strict=True):
        seconds += (record["step"] - step) * each / rate
        step = record["step"]
        if "val_bits_per_byte" in record:
            value = record["val_bits_per_byte"]
            seen.steps.append(step)
            seen.tokens.append(step * each)
            seen.seconds.append(seconds)
            seen.bits_per_byte.append(math.inf if value is None else value)
    return seen


def speed_up(pairs: Sequence[tuple[Curve, Curve]], axis: str) -> SpeedUp | None:
    """How many times sooner the other reaches what the first ends with, seed by seed; where it
    never does, how many times sooner the first reaches what the other ends with, turned round.

    Args:
        pairs: of each seed, the first's curve and the other's.
        axis: `tokens` or `seconds`.

    Returns:
        None where a pair of curves does not tell.
    """
    logs = []
    for first, other in pairs:
        ratio = _ratio(first, other, axis)
        if ratio is None:
            return None
        logs.append(math.log(ratio))
    if not logs:
        return None
    low, high = interval(logs, ALPHA)
    return SpeedUp(
        math.exp(statistics.fmean(logs)),
        None if low is None else math.exp(low),
        None if high is None else math.exp(high),
    )


def _ratio(first: Curve, other: Curve, axis: str) -> float | None:
    if (reached := _reached(other, first.last, axis)) is not None:
        return getattr(first, axis)[-1] / reached
    if (reached := _reached(first, other.last, axis)) is not None:
        return reached / getattr(other, axis)[-1]
    return None


def _reached(curve: Curve, value: float, axis: str) -> float | None:
    """Where a curve first comes down to a value, straight lines drawn between its points."""
    places, values = getattr(curve, axis), curve.bits_per_byte
    below = next((n for n, v in enumerate(values) if v <= value), None)
    if below is None:
        return None
    if below == 0:
        return places[0] if values[0] == value else None  # it was below before it was looked at
    pair = slice(below - 1, below + 1)
    if math.isinf(values[below - 1]):
        return places[below]
    return float(np.interp(value, values[pair][::-1], places[pair][::-1]))
