from __future__ import annotations

from typing import Any

import pytest

from mlxgpt.reports import peers
from mlxgpt.rivals.record import Contest
from tests.reports.measured import cells


def told(contest: Contest) -> str:
    return "\n".join(peers.markdown([contest]))


def figures(**changes: float) -> dict[str, Any]:
    return {
        "tokens_per_second": 100.0,
        "ms_to_first_token": 10.0,
        "seconds_from_start": 1.0,
        "peak_memory": 200e6,
        **changes,
    }


def test_without_contests_there_is_no_section() -> None:
    assert peers.markdown([]) == []


def test_faster_and_smaller_are_above_one() -> None:
    rounds = {
        "mlxgpt": [figures(tokens_per_second=x) for x in (90.0, 100.0, 110.0)],
        "PyTorch": [figures(tokens_per_second=50.0, peak_memory=500e6)] * 3,
    }
    made_with = {
        "PyTorch": {"versions": "torch 2.13", "device": "cpu", "threads": "2", "BLAS": "mkl"}
    }
    text = told(Contest("tier1", "training", 0, rounds, made_with))
    assert cells(text, "mlxgpt") == ["100 (90.0 to 110)", "", "200 (200 to 200)", ""]
    assert cells(text, "PyTorch") == ["50.0 (50.0 to 50.0)", "2.00", "500 (500 to 500)", "2.50"]
    assert cells(text, "PyTorch", 1) == ["torch 2.13", "cpu", "2", "mkl", ""]
    assert "3 rounds" in text


def test_generation_has_a_row_for_each_number_of_texts() -> None:
    slow = figures(tokens_per_second=25.0, ms_to_first_token=30.0, seconds_from_start=4.0)
    both = {"mlxgpt": [figures()], "transformers": [slow]}
    contests = [Contest("tier1", "generate", n, both) for n in (1, 64)]
    text = "\n".join(peers.markdown(contests))
    row = cells(text, "64, transformers")
    assert row[1::2] == ["4.00", "3.00", "4.00", "1.00"]
    assert cells(text, "1, mlxgpt")[0] == "100 (100 to 100)"


def test_learning_is_the_time_to_the_loss_that_all_reach() -> None:
    rounds = {
        "mlxgpt": [{"curve": [[1.0, 4.0], [2.0, 3.0], [3.0, 2.0]]}],
        "PyTorch": [{"curve": [[2.0, 4.0], [4.0, 3.0], [6.0, 2.5]]}],
    }
    text = told(Contest("tier1", "learning", 0, rounds))
    assert cells(text, "mlxgpt") == ["2.0000", "2.50 (2.50 to 2.50)", ""], "half way from 3 to 2"
    assert cells(text, "PyTorch") == ["2.5000", "6.00 (6.00 to 6.00)", "2.40"]


@pytest.mark.parametrize(
    ("curve", "seconds"),
    [
        ([[1.0, 2.0], [2.0, 1.0]], 1.0),  # from the first point on
        ([[1.0, 4.0], [2.0, 2.0], [3.0, 5.0], [5.0, 1.0]], 4.0),  # for good, not for once
    ],
)
def test_a_target_is_reached_for_good(curve: list[list[float]], seconds: float) -> None:
    assert peers._seconds_to(3.0, curve) == pytest.approx(seconds)


def test_who_could_not_do_it_is_named() -> None:
    contest = Contest("tier2", "training", 0, {"mlxgpt": [figures()]}, {}, {"mlx-lm": "no room"})
    assert "- mlx-lm could not do tier2, training: no room" in told(contest)
