from __future__ import annotations

import math

import pytest

from mlxgpt.experiments.verdict import assign_verdicts, match_by_seed, paired_deltas, speed_drift
from tests.helpers.comparisons import make_curve, make_diverged_variant, make_variant_result


def test_variants_are_compared_with_the_first() -> None:
    first, better, worse, same = (
        make_variant_result("a", [2.0, 2.1, 1.9]),
        make_variant_result("b", [1.9, 2.0, 1.801]),
        make_variant_result("c", [2.1, 2.2, 1.999]),
        make_variant_result("d", [2.0, 2.1, 1.9]),
    )
    assign_verdicts([first, better, worse, same], 0.05, sequential=False)
    assert [s.verdict for s in (first, better, worse, same)] == [
        "baseline",
        "better",
        "worse",
        "identical",
    ]
    assert better.difference is not None
    assert better.difference.mean == pytest.approx(-0.1, abs=1e-3)
    assert better.speed_up_tokens is not None
    assert better.speed_up_tokens.ratio > 1
    assert worse.speed_up_seconds is not None
    assert worse.speed_up_seconds.ratio < 1
    assert not any(s.advice for s in (first, better, worse, same))


def test_undecided_variants_report_how_many_seeds_are_needed() -> None:
    first, variant = (
        make_variant_result("a", [2.0, 2.0, 2.0]),
        make_variant_result("b", [1.98, 2.003, 1.975]),
    )
    assign_verdicts([first, variant], 0.05, sequential=False)
    assert variant.verdict == "undecided"
    assert variant.difference is not None
    assert variant.advice == (
        f"about {variant.difference.more} more seeds needed to confirm that it is better by 0.0140"
    )
    hopeless = make_variant_result("b", [2.01, 1.99, 2.001])
    assign_verdicts([first, hopeless], 0.05, sequential=False)
    assert hopeless.advice.startswith("more than 23 seeds needed to confirm that it is worse by")


def test_one_seed_gives_no_verdict() -> None:
    first, variant = make_variant_result("a", [2.0]), make_variant_result("b", [1.0])
    assign_verdicts([first, variant], 0.05, sequential=False)
    assert variant.verdict == "one seed"
    assert "another seed may reverse the result" in variant.advice


def test_multiple_variants_need_a_corrected_p_value() -> None:
    """Holm's correction raises a p-value of 0.035 to 0.14 among four variants."""
    first, near = (
        make_variant_result("a", [2.0, 2.0, 2.0]),
        make_variant_result("b", [1.96, 1.97, 1.98]),
    )
    assign_verdicts([first, near], 0.05, sequential=False)
    assert near.verdict == "better"
    variants = [make_variant_result(name, [1.97, 1.98, 1.99]) for name in "cde"]
    assign_verdicts([first, near, *variants], 0.05, sequential=False)
    assert near.verdict == "uncertain"
    assert near.advice.startswith("p = 0.14 after correction for multiple variants; about")
    assert [variant.verdict for variant in variants] == ["undecided"] * 3


def test_sequential_verdicts_depend_only_on_the_interval() -> None:
    first, variant = (
        make_variant_result("a", [2.0, 2.0, 2.0]),
        make_variant_result("b", [1.96, 1.97, 1.98]),
    )
    assign_verdicts([first, variant], 0.05, sequential=True)
    assert variant.verdict == "better"
    assign_verdicts([first, variant], 0.005, sequential=True)
    assert variant.verdict == "undecided"


def test_diverged_variants_are_not_compared() -> None:
    first, variant, diverged_variant = (
        make_variant_result("a", [2.0, 2.1]),
        make_variant_result("b", [1.9, 2.0]),
        make_diverged_variant("c"),
    )
    assign_verdicts([first, variant, diverged_variant], 0.05, sequential=False)
    assert diverged_variant.verdict == "diverged"
    assert diverged_variant.difference is None
    assert variant.difference is not None
    diverged_first = make_diverged_variant("a")
    assign_verdicts([diverged_first, make_variant_result("b", [1.9, 2.0])], 0.05, sequential=False)
    assert diverged_first.verdict == "diverged"


def test_runs_are_paired_by_seed() -> None:
    """The baseline runs last for every other seed, so its run may be missing."""
    first, variant = make_variant_result("a", [2.0, 2.1]), make_variant_result("b", [1.9, 2.3, 7.0])
    variant.trainings = variant.trainings[::-1]
    assert paired_deltas(first, variant) == pytest.approx([0.2, -0.1])
    assert [(a.seed, b.seed) for a, b in match_by_seed(first, variant)] == [(1, 1), (0, 0)]


def test_speed_drift() -> None:
    first, second = make_variant_result("a", [2.0, 2.0, 2.0]), make_variant_result("b", [2.0])
    assert speed_drift([make_variant_result("a", [2.0]), second]) is None
    for training, rate in zip(first.trainings, (100.0, 90.0, 120.0), strict=True):
        object.__setattr__(training, "curve", make_curve([2.0], tokens_per_second=rate))
    assert speed_drift([first, second]) == pytest.approx((-0.1, 0.2))
    unmeasured = make_variant_result("c", [2.0, 2.0])
    for training in unmeasured.trainings:
        object.__setattr__(training, "curve", make_curve([2.0], tokens_per_second=math.nan))
    assert speed_drift([unmeasured, first]) == pytest.approx((-0.1, 0.2))
    assert speed_drift([unmeasured]) is None
