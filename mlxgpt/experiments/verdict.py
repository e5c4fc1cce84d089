"""From trainings to verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from mlxgpt.experiments import statistics
from mlxgpt.experiments.curves import speed_up
from mlxgpt.experiments.results import Training, VariantResult
from mlxgpt.experiments.statistics import ALPHA, Difference


def judge(results: Sequence[VariantResult], level: float, *, sequential: bool) -> None:
    """Fill in differences, speed-ups and verdicts of all variants but the first, which the others
    are compared with, seed by seed.
    """
    first, *others = results
    first.verdict = "diverged" if first.diverged else "the first"
    compared = [s for s in others if s.trainings and not s.diverged and not first.diverged]
    differences = statistics.differences([pairs(first, s) for s in compared], level)
    for result in others:
        if result.diverged:
            result.verdict = "diverged"
        elif not result.trainings:
            result.verdict = "not trained yet"
    for result, difference in zip(compared, differences, strict=True):
        curves = [(a.curve, b.curve) for a, b in matched(first, result) if a.curve and b.curve]
        result.difference = difference
        result.speed_up_tokens = speed_up(curves, "tokens")
        result.speed_up_seconds = speed_up(curves, "seconds")
        seeds = len(result.trainings)
        result.verdict = _verdict(difference, sequential=sequential)
        result.advice = _advice(result.verdict, difference, seeds)


def pairs(first: VariantResult, other: VariantResult) -> list[float]:
    """What a variant reached minus what the first one did, for each seed that both have."""
    return [two.bits_per_byte - one.bits_per_byte for one, two in matched(first, other)]


def matched(first: VariantResult, other: VariantResult) -> list[tuple[Training, Training]]:
    """The trainings of two variants, paired by seed."""
    by_seed = {training.seed: training for training in first.trainings}
    return [(by_seed[t.seed], t) for t in other.trainings if t.seed in by_seed]


def drift(results: Sequence[VariantResult]) -> tuple[float, float] | None:
    """How far the slowest and the fastest training's speed lie from their variant's median, as
    shares; None where no variant has two trainings.
    """
    shares = []
    for result in results:
        rates = sorted(t.curve.tokens_per_second for t in result.trainings if t.curve)
        if len(rates) > 1:
            median = rates[len(rates) // 2]
            shares += [rate / median - 1 for rate in rates]
    return (min(shares), max(shares)) if shares else None


UNDECIDED, UNCERTAIN = "undecided", "not certain"


def _verdict(difference: Difference, *, sequential: bool) -> str:
    low, high, p = difference.low, difference.high, difference.p
    if low is None or high is None or p is None:
        return "one seed"
    if low == high == 0:
        return "the same"
    # Holm's p corrects for the number of variants; the sequential level has done so already.
    if not low <= 0 <= high if sequential else p < ALPHA:
        return "better" if difference.mean < 0 else "worse"
    return UNDECIDED if low <= 0 <= high else UNCERTAIN


def _advice(verdict: str, difference: Difference, seeds: int) -> str:
    if verdict == "one seed":
        return "one seed tells nothing: the next one may say the contrary"
    if verdict not in (UNDECIDED, UNCERTAIN):
        return ""
    side = "better" if difference.mean < 0 else "worse"
    if difference.more is None:
        more = f"more than {seeds + statistics.MOST_MORE} seeds"
    else:
        more = f"about {max(1, difference.more)} more seed{'s' * (difference.more > 1)}"
    chance = f"p = {difference.p:.2f} among all that are compared; " * (verdict == UNCERTAIN)
    return f"{chance}{more} would decide, if it is {side} by {abs(difference.mean):.4f}"
