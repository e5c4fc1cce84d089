from __future__ import annotations

import math

from mlxgpt.experiments.report import (
    COMPARISON_COLUMNS,
    format_notes,
    format_variant_row,
    render_comparison,
)
from mlxgpt.experiments.results import ComparisonRecord
from mlxgpt.experiments.verdict import assign_verdicts, speed_drift
from tests.helpers.comparisons import (
    make_comparison_record,
    make_diverged_variant,
    make_variant_result,
)


def make_record(**fields: object) -> ComparisonRecord:
    first, second = (
        make_variant_result("a", [2.0, 2.1, 1.9]),
        make_variant_result("b", [1.9, 1.95, 1.75]),
    )
    variants = [second, make_diverged_variant("c"), make_variant_result("d", [])]
    assign_verdicts([first, *variants], 0.05, sequential=False)
    return make_comparison_record(first, *variants, drift=speed_drift([first, *variants]), **fields)


def test_a_row_has_a_cell_for_each_column() -> None:
    rows = [format_variant_row(s) for s in make_record().variants]
    assert {len(row) for row in rows} == {len(COMPARISON_COLUMNS)}
    first, better_row, diverged_row, untrained_row = rows
    assert first == ["a", "3", "2.0000", "", "", "", "baseline"]
    assert better_row[:3] == ["b", "3", "1.8667"]
    assert better_row[3].startswith("-0.1333 ± 0.0")
    assert better_row[4].endswith(" ×")
    assert (diverged_row[2], diverged_row[-1]) == ("inf", "diverged")
    assert (untrained_row[2], untrained_row[-1]) == ("–", "not trained yet")


def test_the_report_lists_every_seed_and_the_changed_settings() -> None:
    page = render_comparison(make_record())
    assert page.startswith("# mine\n\n| variant | seeds |")
    assert "| b | dropout 0.1 (0.0) | 1,000 | 3 | 300 | 6 | 1.9000, 1.9500, 1.7500 |" in page
    assert "Machine: a machine." in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables[:6]}) == 1


def test_a_run_without_a_speed_has_no_time() -> None:
    """As after resuming a run for its last step only."""
    slow = make_variant_result("a", [2.0, 2.1])
    for training in slow.trainings:
        assert training.curve
        training.curve.seconds[-1] = math.nan
    assert "nan" not in render_comparison(make_comparison_record(slow))


def test_notes_explain_the_comparison() -> None:
    notes = "\n".join(format_notes(make_record()))
    assert "1,234 bytes held out of the training text of my-text" in notes
    assert "± is a 95% confidence interval" in notes
    assert "+0.0% to +0.0%" in notes, "the machine's speed"
    assert "looked at" not in notes
    with_looks = "\n".join(format_notes(make_record(looks=[3, 5], final_looks=2, interrupted=True)))
    assert "checked after 3, 5 seeds" in with_looks
    assert "The validation text was evaluated 2 times" in with_looks
    assert "the same command resumes it" in with_looks
    sequential = "\n".join(
        format_notes(make_record(looks=[3, 5], sequential=True, level=0.004, final_looks=1))
    )
    assert "checked after" not in sequential, "the rule knows"
    interval = "a 99.6% confidence interval, corrected for repeated looks and multiple variants"
    assert interval in sequential
    assert "was evaluated once" in sequential
    final = "\n".join(format_notes(make_record(judged_on="validation")))
    assert "Bits per byte on the validation text of my-text" in final


def test_advice_comes_first() -> None:
    first, second = make_variant_result("a", [2.0, 2.0]), make_variant_result("b", [1.9, 2.05])
    assign_verdicts([first, second], 0.05, sequential=False)
    assert format_notes(make_comparison_record(first, second))[0].startswith("b: ")
