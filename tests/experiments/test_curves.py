from __future__ import annotations

import math
from pathlib import Path

import pytest

from mlxgpt.experiments.curves import LearningCurve, build_learning_curve, compute_speedup
from mlxgpt.storage import run as runs
from tests.helpers import comparisons


def test_the_curve_of_a_run(trained: Path) -> None:
    run = runs.open_run(trained / "runs" / "done")
    found = build_learning_curve(run)
    assert found.steps == [4, 8, 12]
    assert found.tokens == [4 * 4 * 8, 8 * 4 * 8, 12 * 4 * 8]
    ends = [r["val_bits_per_byte"] for r in run.metrics() if "val_loss" in r]
    assert found.bits_per_byte == ends
    assert found.final_bits_per_byte == ends[-1]
    rates = sorted(record["tokens_per_second"] for record in run.metrics())
    assert rates[0] <= found.tokens_per_second <= rates[-1]


def test_seconds_are_those_of_training(home: Path, trained: Path) -> None:
    """As many as the tokens of each interval at its rate; in the first one, where kernels are
    compiled, at the median's; and where a rate is missing, too.
    """
    run = runs.open_run(trained / "runs" / "done")
    other = runs.Run(
        home, run.config, run.tokenizer, "words", run.data_fingerprint, add_bos_token=False
    )
    for step, rate in ((2, 1.0), (4, 100.0), (6, 0.0), (8, 50.0), (12, 200.0)):
        value = {"val_bits_per_byte": 3.0} if step % 4 == 0 else {}
        other.log({"step": step, "tokens_per_second": rate, **value})
    found = build_learning_curve(other)
    assert found.tokens_per_second == 75.0
    each = 2 * 4 * 8
    after_two = each / 75
    assert found.seconds == pytest.approx(
        [
            after_two + each / 100,
            after_two + each / 100 + each / 75 + each / 50,
            after_two + each / 100 + each / 75 + each / 50 + 2 * each / 200,
        ]
    )


def test_what_is_no_number_is_infinite(home: Path, trained: Path) -> None:
    run = runs.open_run(trained / "runs" / "done")
    other = runs.Run(
        home, run.config, run.tokenizer, "words", run.data_fingerprint, add_bos_token=False
    )
    other.log({"step": 4, "tokens_per_second": 1.0, "val_bits_per_byte": None})
    assert build_learning_curve(other).final_bits_per_byte == math.inf


def test_a_curve_that_comes_down_twice_as_soon() -> None:
    first = comparisons.curve([3.5, 3.0, 2.5, 2.0])
    soon = comparisons.curve([3.0, 2.0, 1.5, 1.0], rate=100.0)
    found = compute_speedup([(first, soon)] * 3, "tokens")
    assert found is not None
    assert (found.ratio, found.low, found.high) == pytest.approx((2, 2, 2))
    in_time = compute_speedup([(first, soon)], "seconds")
    assert in_time is not None
    assert in_time.ratio == pytest.approx(4), "it is twice as fast, too"
    assert in_time.low is None
    back = compute_speedup([(soon, first)], "tokens")
    assert back is not None
    assert back.ratio == pytest.approx(1 / 2), "who never gets there is measured the other way"


def test_between_points_lines_are_drawn() -> None:
    first = comparisons.curve([3.0, 2.5])  # ends with 2.5 after 200 tokens
    other = comparisons.curve([3.0, 2.0])  # which the other has at 150
    found = compute_speedup([(first, other)], "tokens")
    assert found is not None
    assert found.ratio == pytest.approx(200 / 150)


def test_the_mean_is_the_geometric_one() -> None:
    first = comparisons.curve([3.0, 2.5, 2.0, 1.5])
    quick, slow = comparisons.curve([2.0, 1.5]), comparisons.curve([3.0, 2.5, 2.0, 1.75])
    found = compute_speedup([(first, quick), (first, slow)], "tokens")
    assert found is not None
    assert found.ratio == pytest.approx(math.sqrt((400 / 200) * (350 / 400)))
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.ratio < found.high


def test_curves_that_do_not_tell() -> None:
    low: LearningCurve = comparisons.curve([1.0, 0.9])
    high = comparisons.curve([4.0, 3.9])
    assert compute_speedup([(high, low)], "tokens") is None, "below before it was looked at"
    assert compute_speedup([], "tokens") is None
