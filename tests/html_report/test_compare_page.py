from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from mlxgpt.experiments.results import Record, from_json
from mlxgpt.experiments.verdict import judge
from mlxgpt.html_report.compare_page import page_of
from mlxgpt.utils.errors import UserError
from mlxgpt.utils.files import finite
from tests.helpers.comparisons import diverged, record, variant_result
from tests.html_report.test_page import HOSTILE, Seen


def judged(**given: object) -> Record:
    first, other = variant_result("a", [2.0, 2.1, 1.9]), variant_result("b", [1.9, 1.95, 1.75])
    others = [other, diverged("c"), variant_result("d", [])]
    judge([first, *others], 0.05, sequential=False)
    return record(first, *others, **given)


def test_a_comparison_shows_differences_curves_and_verdicts() -> None:
    html = page_of(judged()).html()
    told = Seen(html).text
    for words in ("How far from a", "Curves", "-0.1333 ±", "better", "diverged", "not trained yet"):
        assert words in told, words
    assert "Differences from a: b: -0.1333, better" in html
    assert html.count("<svg") == 3 * 2, "a forest plot and two curves, each for two widths"


def test_names_are_text() -> None:
    first, other = variant_result(HOSTILE, [2.0, 2.1]), variant_result("$x$ | `y`", [1.9, 1.8])
    judge([first, other], 0.05, sequential=False)
    html = page_of(record(first, other)).html()
    assert "<script" not in html
    assert "alert(1)" in Seen(html).text


def test_one_seed_and_one_variant_make_a_page() -> None:
    first, other = variant_result("a", [2.0]), variant_result("b", [1.9])
    judge([first, other], 0.05, sequential=False)
    assert "one seed" in Seen(page_of(record(first, other)).html()).text
    assert "<svg" not in page_of(record(variant_result("a", []), variant_result("b", []))).html()


def test_of_many_variants_the_first_and_the_best_are_drawn() -> None:
    all_of_them = [variant_result(f"v{n}", [2 + n / 10, 2.1 + n / 10]) for n in range(8)]
    judge(all_of_them, 0.05, sequential=False)
    html = page_of(record(*reversed(all_of_them))).html()
    assert "Of 3 more variants the table tells" in html
    assert "Bits per byte by minutes: v7: " in html
    assert "; v0: " in html


def test_a_record_comes_back_from_its_file() -> None:
    before = judged(drift=(-0.1, 0.2), looks=[1, 3], final_looks=2, interrupted=True)
    after = from_json(json.dumps(finite(asdict(before))))
    assert after.variants[2].diverged
    assert asdict(after) == asdict(from_json(json.dumps(finite(asdict(after)))))
    told = [page_of(one).html() for one in (before, after)]
    assert told[0] == told[1]


@pytest.mark.parametrize("damage", ["{", "[]", "null", "5", '"variants"', '{"variants": [1]}'])
def test_something_else_is_no_record(damage: str) -> None:
    with pytest.raises(UserError, match="no comparison's result"):
        from_json(damage)


def test_a_curve_with_a_hole_is_no_record() -> None:
    tree = finite(asdict(judged()))
    tree["variants"][0]["trainings"][0]["curve"]["steps"].pop()
    with pytest.raises(UserError, match="no comparison's result"):
        from_json(json.dumps(tree))
