from __future__ import annotations

import math

import pytest

from mlxgpt.experiments.scaling_report import (
    RESULT_COLUMNS,
    format_result_row,
    format_scaling_notes,
    render_scaling,
)
from tests.helpers.comparisons import make_scaling_record


def test_a_row_for_each_size_and_length() -> None:
    record = make_scaling_record()
    rows = [format_result_row(record, result) for result in record.results]
    assert {len(row) for row in rows} == {len(RESULT_COLUMNS)}
    assert rows[0][:5] == ["1 × 64", "0.50M", "0.20M", "0.2", "3"]
    assert rows[-1][0] == "5 × 320 (test)"
    for row in rows:
        assert float(row[-2]) == pytest.approx(float(row[-1]), abs=3e-3)


@pytest.mark.parametrize(("error", "verdict"), [(0.0, "inside"), (0.2, "do not rely on the law")])
def test_the_law_is_tested_on_the_largest_size(error: float, verdict: str) -> None:
    notes = format_scaling_notes(make_scaling_record(error))
    (test,) = (note for note in notes if note.startswith("Test: for 5 × 320"))
    assert verdict in test


def test_tokens_per_parameter_and_epochs_are_explained() -> None:
    text = render_scaling(make_scaling_record())
    assert "tokens per parameter give the lowest loss" in text
    assert "Beyond 4 epochs the law does not hold" in text
    assert "| 5 | 2 × 128 | 1.00M | 3.00M | 0.5 | 0.900 (0.800 to 1.000) |" in text


def test_an_unfinished_study_has_no_law() -> None:
    record = make_scaling_record()
    record.fit, record.advice, record.interrupted = None, [], True
    record.test.losses = []
    text = render_scaling(record)
    assert "the same command resumes it" in text
    assert format_result_row(record, record.test)[-3:] == ["0", "–", "–"]
    record.interrupted, record.test.losses = False, [math.inf]
    assert "No law was fitted, since a run diverged" in render_scaling(record)
    assert format_result_row(record, record.test)[-2:] == ["diverged", "–"]
