"""Judge the variants of a comparison by the results of their runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlxgpt.experiments import statistics
from mlxgpt.experiments.curves import compute_speedup
from mlxgpt.experiments.results import RunResult, VariantResult
from mlxgpt.experiments.statistics import ALPHA, PairedDifference


def assign_verdicts(results: Sequence[VariantResult], alpha: float, *, sequential: bool) -> None:
    """Set the differences, speedups and verdicts of all variants. The first one is the baseline;
    runs are paired by seed.
    """
    baseline, *candidates = results
    baseline.verdict = "diverged" if baseline.diverged else "baseline"
    comparable = [
        candidate
        for candidate in candidates
        if candidate.trainings and not candidate.diverged and not baseline.diverged
    ]
    differences = statistics.compute_paired_differences(
        [paired_deltas(baseline, candidate) for candidate in comparable], alpha
    )
    for result in candidates:
        if result.diverged:
            result.verdict = "diverged"
        elif not result.trainings:
            result.verdict = "not trained yet"
    for result, difference in zip(comparable, differences, strict=True):
        curve_pairs = [
            (a.curve, b.curve) for a, b in match_by_seed(baseline, result) if a.curve and b.curve
        ]
        result.difference = difference
        result.speed_up_tokens = compute_speedup(curve_pairs, "tokens")
        result.speed_up_seconds = compute_speedup(curve_pairs, "seconds")
        seeds = len(result.trainings)
        result.verdict = _classify_difference(difference, sequential=sequential)
        result.advice = _format_advice(result.verdict, difference, seeds)


def paired_deltas(baseline: VariantResult, candidate: VariantResult) -> list[float]:
    """Bits per byte of a variant minus the baseline's, for each seed that both have."""
    return [
        candidate_run.bits_per_byte - baseline_run.bits_per_byte
        for baseline_run, candidate_run in match_by_seed(baseline, candidate)
    ]


def match_by_seed(
    baseline: VariantResult, candidate: VariantResult
) -> list[tuple[RunResult, RunResult]]:
    """Runs of two variants, paired by seed: (baseline's, candidate's)."""
    by_seed = {run_result.seed: run_result for run_result in baseline.trainings}
    return [(by_seed[t.seed], t) for t in candidate.trainings if t.seed in by_seed]


def speed_drift(results: Sequence[VariantResult]) -> tuple[float, float] | None:
    """Relative deviation of the slowest and fastest run from its variant's median speed; None if no
    variant has two runs.
    """
    deviations = []
    for result in results:
        all_rates = (t.curve.tokens_per_second for t in result.trainings if t.curve)
        rates = sorted(rate for rate in all_rates if math.isfinite(rate))
        if len(rates) > 1:
            median = rates[len(rates) // 2]
            deviations += [rate / median - 1 for rate in rates]
    return (min(deviations), max(deviations)) if deviations else None


UNDECIDED, UNCERTAIN = "undecided", "uncertain"  # the verdicts that more seeds may change


def _classify_difference(difference: PairedDifference, *, sequential: bool) -> str:
    low, high, p = difference.low, difference.high, difference.p
    if low is None or high is None or p is None:
        return "one seed"
    if low == high == 0:
        return "identical"
    # Holm's p corrects for the number of variants; the sequential level already does.
    if not low <= 0 <= high if sequential else p < ALPHA:
        return "better" if difference.mean < 0 else "worse"
    return UNDECIDED if low <= 0 <= high else UNCERTAIN


def _format_advice(verdict: str, difference: PairedDifference, seeds: int) -> str:
    if verdict == "one seed":
        return "one seed is not enough: another seed may reverse the result"
    if verdict not in (UNDECIDED, UNCERTAIN):
        return ""
    direction = "better" if difference.mean < 0 else "worse"
    if difference.more is None:
        more_seeds = f"more than {seeds + statistics.MAX_ADDITIONAL_SEEDS} seeds"
    else:
        more_seeds = f"about {max(1, difference.more)} more seed{'s' * (difference.more > 1)}"
    p_note = f"p = {difference.p:.2f} after correction for multiple variants; " * (
        verdict == UNCERTAIN
    )
    effect = f"{direction} by {abs(difference.mean):.4f}"
    return f"{p_note}{more_seeds} needed to confirm that it is {effect}"
