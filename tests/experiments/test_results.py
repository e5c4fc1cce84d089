from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict

import pytest

from mlxgpt.experiments.curves import LearningCurve
from mlxgpt.experiments.results import ComparisonRecord, VariantResult, parse_comparison_record
from mlxgpt.experiments.verdict import assign_verdicts
from mlxgpt.html_report.compare_page import build_comparison_page
from mlxgpt.utils.json_files import replace_nonfinite
from tests.helpers.comparisons import make_comparison_record, make_variant_result


def has_no_time(curve: LearningCurve) -> None:
    """As after resuming a run for its last step only."""
    curve.seconds[-1] = math.nan


def diverges(curve: LearningCurve) -> None:
    curve.bits_per_byte[-1] = math.inf


def comparison(change: Callable[[LearningCurve], None]) -> ComparisonRecord:
    variants: list[VariantResult] = [
        make_variant_result("a", [2.0, 2.1]),
        make_variant_result("b", [1.9, 1.95]),
    ]
    for run_result in variants[1].trainings:
        assert run_result.curve
        change(run_result.curve)
    assign_verdicts(variants, 0.05, sequential=False)
    return make_comparison_record(*variants)


@pytest.mark.parametrize("change", [has_no_time, diverges])
def test_nonfinite_values_survive_json(change: Callable[[LearningCurve], None]) -> None:
    """Stored as null and read as NaN for times and infinity for losses."""
    record = comparison(change)
    stored = json.dumps(replace_nonfinite(asdict(record)))
    parsed = parse_comparison_record(stored)
    assert str(parsed) == str(record), "equal, also where NaN is not equal to NaN"
    assert build_comparison_page(parsed).to_html() == build_comparison_page(record).to_html()
