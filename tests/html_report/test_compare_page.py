from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from mlxgpt.experiments.results import ComparisonRecord, parse_comparison_record
from mlxgpt.experiments.verdict import assign_verdicts
from mlxgpt.html_report.compare_page import build_comparison_page
from mlxgpt.utils.errors import UserError
from mlxgpt.utils.json_files import replace_nonfinite
from tests.helpers.comparisons import (
    make_comparison_record,
    make_diverged_variant,
    make_variant_result,
)
from tests.html_report.test_page import HOSTILE, ParsedPage


def make_record(**fields: object) -> ComparisonRecord:
    first, second = (
        make_variant_result("a", [2.0, 2.1, 1.9]),
        make_variant_result("b", [1.9, 1.95, 1.75]),
    )
    variants = [second, make_diverged_variant("c"), make_variant_result("d", [])]
    assign_verdicts([first, *variants], 0.05, sequential=False)
    return make_comparison_record(first, *variants, **fields)


def test_page_has_differences_curves_and_verdicts() -> None:
    html = build_comparison_page(make_record()).to_html()
    text = ParsedPage(html).text
    for words in (
        "Difference from a",
        "Learning curves",
        "-0.1333 ±",
        "better",
        "diverged",
        "not trained yet",
    ):
        assert words in text, words
    assert "Differences from a: b: -0.1333, better" in html
    assert html.count("<svg") == 3 * 2, "a forest plot and two x axes, each for two widths"


def test_names_are_escaped() -> None:
    first, second = (
        make_variant_result(HOSTILE, [2.0, 2.1]),
        make_variant_result("$x$ | `y`", [1.9, 1.8]),
    )
    assign_verdicts([first, second], 0.05, sequential=False)
    html = build_comparison_page(make_comparison_record(first, second)).to_html()
    assert "<script" not in html
    assert "alert(1)" in ParsedPage(html).text


def test_page_without_intervals_or_results() -> None:
    first, second = make_variant_result("a", [2.0]), make_variant_result("b", [1.9])
    assign_verdicts([first, second], 0.05, sequential=False)
    assert (
        "one seed"
        in ParsedPage(build_comparison_page(make_comparison_record(first, second)).to_html()).text
    )
    assert (
        "<svg"
        not in build_comparison_page(
            make_comparison_record(make_variant_result("a", []), make_variant_result("b", []))
        ).to_html()
    )


def test_only_baseline_and_best_variants_are_plotted() -> None:
    variants = [make_variant_result(f"v{n}", [2 + n / 10, 2.1 + n / 10]) for n in range(8)]
    assign_verdicts(variants, 0.05, sequential=False)
    html = build_comparison_page(make_comparison_record(*reversed(variants))).to_html()
    assert "The table lists 3 more variants" in html
    assert "Bits per byte by minutes: v7: " in html
    assert "; v0: " in html


def test_record_round_trips_through_json() -> None:
    original = make_record(drift=(-0.1, 0.2), looks=[1, 3], final_looks=2, interrupted=True)
    parsed = parse_comparison_record(json.dumps(replace_nonfinite(asdict(original))))
    assert parsed.variants[2].diverged
    assert asdict(parsed) == asdict(
        parse_comparison_record(json.dumps(replace_nonfinite(asdict(parsed))))
    )
    pages = [build_comparison_page(comparison).to_html() for comparison in (original, parsed)]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("damage", ["{", "[]", "null", "5", '"variants"', '{"variants": [1]}'])
def test_invalid_record_is_refused(damage: str) -> None:
    with pytest.raises(UserError, match="not a valid comparison result"):
        parse_comparison_record(damage)


def test_record_with_an_incomplete_curve_is_refused() -> None:
    tree = replace_nonfinite(asdict(make_record()))
    tree["variants"][0]["trainings"][0]["curve"]["steps"].pop()
    with pytest.raises(UserError, match="not a valid comparison result"):
        parse_comparison_record(json.dumps(tree))
