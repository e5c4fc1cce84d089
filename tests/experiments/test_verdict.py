from __future__ import annotations

import pytest

from mlxgpt.experiments.verdict import assign_verdicts, match_by_seed, paired_deltas, speed_drift
from tests.helpers.comparisons import curve, diverged, variant_result


def test_the_first_is_what_the_others_are_compared_with() -> None:
    first, better, worse, same = (
        variant_result("a", [2.0, 2.1, 1.9]),
        variant_result("b", [1.9, 2.0, 1.801]),
        variant_result("c", [2.1, 2.2, 1.999]),
        variant_result("d", [2.0, 2.1, 1.9]),
    )
    assign_verdicts([first, better, worse, same], 0.05, sequential=False)
    assert [s.verdict for s in (first, better, worse, same)] == [
        "the first",
        "better",
        "worse",
        "the same",
    ]
    assert better.difference is not None
    assert better.difference.mean == pytest.approx(-0.1, abs=1e-3)
    assert better.speed_up_tokens is not None
    assert better.speed_up_tokens.ratio > 1
    assert worse.speed_up_seconds is not None
    assert worse.speed_up_seconds.ratio < 1
    assert not any(s.advice for s in (first, better, worse, same))


def test_what_is_undecided_says_how_many_seeds_would_tell() -> None:
    first, other = variant_result("a", [2.0, 2.0, 2.0]), variant_result("b", [1.98, 2.003, 1.975])
    assign_verdicts([first, other], 0.05, sequential=False)
    assert other.verdict == "undecided"
    assert other.difference is not None
    assert other.advice == (
        f"about {other.difference.more} more seeds would decide, if it is better by 0.0140"
    )
    hopeless = variant_result("b", [2.01, 1.99, 2.001])
    assign_verdicts([first, hopeless], 0.05, sequential=False)
    assert hopeless.advice.startswith("more than 23 seeds would decide, if it is worse by 0.0003")


def test_one_seed_tells_nothing() -> None:
    first, other = variant_result("a", [2.0]), variant_result("b", [1.0])
    assign_verdicts([first, other], 0.05, sequential=False)
    assert other.verdict == "one seed"
    assert "the next one may say the contrary" in other.advice


def test_among_many_the_interval_alone_is_not_enough() -> None:
    """By itself p is 0.035; among four, Holm makes it 0.14."""
    first, near = variant_result("a", [2.0, 2.0, 2.0]), variant_result("b", [1.96, 1.97, 1.98])
    assign_verdicts([first, near], 0.05, sequential=False)
    assert near.verdict == "better"
    others = [variant_result(name, [1.97, 1.98, 1.99]) for name in "cde"]
    assign_verdicts([first, near, *others], 0.05, sequential=False)
    assert near.verdict == "not certain"
    assert near.advice.startswith("p = 0.14 among all that are compared; about")
    assert [other.verdict for other in others] == ["undecided"] * 3


def test_where_seeds_were_added_the_interval_alone_decides() -> None:
    first, other = variant_result("a", [2.0, 2.0, 2.0]), variant_result("b", [1.96, 1.97, 1.98])
    assign_verdicts([first, other], 0.05, sequential=True)
    assert other.verdict == "better"
    assign_verdicts([first, other], 0.005, sequential=True)
    assert other.verdict == "undecided"


def test_who_diverged_is_not_compared() -> None:
    first, other, gone = (
        variant_result("a", [2.0, 2.1]),
        variant_result("b", [1.9, 2.0]),
        diverged("c"),
    )
    assign_verdicts([first, other, gone], 0.05, sequential=False)
    assert gone.verdict == "diverged"
    assert gone.difference is None
    assert other.difference is not None
    lost = diverged("a")
    assign_verdicts([lost, variant_result("b", [1.9, 2.0])], 0.05, sequential=False)
    assert lost.verdict == "diverged"


def test_pairs_are_of_the_same_seed() -> None:
    """In every other round the first comes last, and may be missing."""
    first, other = variant_result("a", [2.0, 2.1]), variant_result("b", [1.9, 2.3, 7.0])
    other.trainings = other.trainings[::-1]
    assert paired_deltas(first, other) == pytest.approx([0.2, -0.1])
    assert [(a.seed, b.seed) for a, b in match_by_seed(first, other)] == [(1, 1), (0, 0)]


def test_the_drift_of_the_machine() -> None:
    one, two = variant_result("a", [2.0, 2.0, 2.0]), variant_result("b", [2.0])
    assert speed_drift([variant_result("a", [2.0]), two]) is None
    for training, rate in zip(one.trainings, (100.0, 90.0, 120.0), strict=True):
        object.__setattr__(training, "curve", curve([2.0], rate=rate))
    assert speed_drift([one, two]) == pytest.approx((-0.1, 0.2))
