from __future__ import annotations

import math
from pathlib import Path

import pytest

from mlxgpt.experiments.curves import LearningCurve, build_learning_curve, compute_speedup
from mlxgpt.storage import run as runs
from tests.helpers import comparisons


def test_the_learning_curve_of_a_run(trained: Path) -> None:
    run = runs.open_run(trained / "runs" / "done")
    curve = build_learning_curve(run)
    assert curve.steps == [4, 8, 12]
    assert curve.tokens == [4 * 4 * 8, 8 * 4 * 8, 12 * 4 * 8]
    ends = [r["val_bits_per_byte"] for r in run.metrics() if "val_loss" in r]
    assert curve.bits_per_byte == ends
    assert curve.final_bits_per_byte == ends[-1]
    rates = sorted(record["tokens_per_second"] for record in run.metrics())
    assert rates[0] <= curve.tokens_per_second <= rates[-1]


def test_seconds_are_computed_from_training_speed(home: Path, trained: Path) -> None:
    """The first interval, which includes compilation, and those without a rate use the median."""
    run = runs.open_run(trained / "runs" / "done")
    new_run = runs.Run(
        home, run.config, run.tokenizer, "words", run.data_fingerprint, add_bos_token=False
    )
    for step, rate in ((2, 1.0), (4, 100.0), (6, 0.0), (8, 50.0), (12, 200.0)):
        value = {"val_bits_per_byte": 3.0} if step % 4 == 0 else {}
        new_run.log({"step": step, "tokens_per_second": rate, **value})
    curve = build_learning_curve(new_run)
    assert curve.tokens_per_second == 75.0
    tokens_per_interval = 2 * 4 * 8
    after_two = tokens_per_interval / 75
    assert curve.seconds == pytest.approx(
        [
            after_two + tokens_per_interval / 100,
            after_two
            + tokens_per_interval / 100
            + tokens_per_interval / 75
            + tokens_per_interval / 50,
            after_two
            + tokens_per_interval / 100
            + tokens_per_interval / 75
            + tokens_per_interval / 50
            + 2 * tokens_per_interval / 200,
        ]
    )


def test_a_missing_loss_is_infinite(home: Path, trained: Path) -> None:
    run = runs.open_run(trained / "runs" / "done")
    new_run = runs.Run(
        home, run.config, run.tokenizer, "words", run.data_fingerprint, add_bos_token=False
    )
    new_run.log({"step": 4, "tokens_per_second": 1.0, "val_bits_per_byte": None})
    assert build_learning_curve(new_run).final_bits_per_byte == math.inf


def test_speedup_of_a_curve_that_falls_twice_as_fast() -> None:
    first = comparisons.make_curve([3.5, 3.0, 2.5, 2.0])
    faster = comparisons.make_curve([3.0, 2.0, 1.5, 1.0], tokens_per_second=100.0)
    speedup = compute_speedup([(first, faster)] * 3, "tokens")
    assert speedup is not None
    assert (speedup.ratio, speedup.low, speedup.high) == pytest.approx((2, 2, 2))
    time_speedup = compute_speedup([(first, faster)], "seconds")
    assert time_speedup is not None
    assert time_speedup.ratio == pytest.approx(4), "it is twice as fast, too"
    assert time_speedup.low is None
    reverse_speedup = compute_speedup([(faster, first)], "tokens")
    assert reverse_speedup is not None
    assert reverse_speedup.ratio == pytest.approx(1 / 2), (
        "who never gets there is measured the other way"
    )


def test_speedup_interpolates_between_points() -> None:
    first = comparisons.make_curve([3.0, 2.5])  # ends at 2.5 after 200 tokens
    second = comparisons.make_curve([3.0, 2.0])  # reaches 2.5 after 150
    speedup = compute_speedup([(first, second)], "tokens")
    assert speedup is not None
    assert speedup.ratio == pytest.approx(200 / 150)


def test_the_mean_speedup_is_geometric() -> None:
    first = comparisons.make_curve([3.0, 2.5, 2.0, 1.5])
    quick, slow = comparisons.make_curve([2.0, 1.5]), comparisons.make_curve([3.0, 2.5, 2.0, 1.75])
    speedup = compute_speedup([(first, quick), (first, slow)], "tokens")
    assert speedup is not None
    assert speedup.ratio == pytest.approx(math.sqrt((400 / 200) * (350 / 400)))
    assert speedup.low is not None
    assert speedup.high is not None
    assert speedup.low < speedup.ratio < speedup.high


def test_curves_that_cannot_be_compared_have_no_speedup() -> None:
    low: LearningCurve = comparisons.make_curve([1.0, 0.9])
    high = comparisons.make_curve([4.0, 3.9])
    assert compute_speedup([(high, low)], "tokens") is None, "below before it was looked at"
    assert compute_speedup([], "tokens") is None
