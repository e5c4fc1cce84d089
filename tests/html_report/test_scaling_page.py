from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from mlxgpt import api
from mlxgpt.html_report.scaling_page import build_scaling_page
from mlxgpt.utils.errors import UserError
from tests.helpers.comparisons import make_scaling_record


def test_the_page_shows_losses_law_and_advice() -> None:
    html = build_scaling_page(make_scaling_record()).to_html()
    for part in ("Loss over tokens", "Loss over parameters", "(test)"):
        assert part in html, part
    assert "the law, which is not fitted to the largest size, 5 × 320." in html
    assert "Which size for which time" in html


def test_an_unfinished_study_has_no_plots() -> None:
    record = make_scaling_record()
    record.fit, record.advice, record.interrupted = None, [], True
    record.test.losses = []
    html = build_scaling_page(record).to_html()
    assert "<svg" not in html
    assert "the same command resumes it" in html


def test_report_makes_the_page_from_json(tmp_path: Path) -> None:
    path = tmp_path / "law.json"
    path.write_text(json.dumps(asdict(make_scaling_record())))
    page = api.report(path)
    assert "Scaling: law" in page.read_text()
    with pytest.raises(UserError, match="several comparisons"):
        api.report(path, path)


def test_a_diverged_run_is_left_out_of_the_plots() -> None:
    record = make_scaling_record()
    record.fit, record.advice = None, []
    record.fitted[0].losses[1] = math.inf
    html = build_scaling_page(record).to_html()
    assert "<svg" in html
    assert "diverged" in html
