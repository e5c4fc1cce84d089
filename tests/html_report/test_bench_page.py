from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxgpt.bench.records import Measurement
from mlxgpt.html_report.bench_page import build_benchmark_page
from tests.helpers.bench_measurement import make_measurement
from tests.html_report.test_page import HOSTILE, ParsedPage


def measure_on(**changes: Any) -> Measurement:
    """Make a measurement with changed fields of its machine."""
    original = make_measurement()
    return replace(original, machine=replace(original.machine, **changes))


def test_page_of_one_machine_has_estimates() -> None:
    html = build_benchmark_page([make_measurement()]).to_html()
    text = ParsedPage(html).text
    for words in ("measured and estimated", "Apple chips: estimated", "How to reproduce"):
        assert words in text, words
    assert "Estimated: from" in html
    assert "hollow markers are estimated" in text
    assert "<svg" in html


def test_page_of_several_machines() -> None:
    second = measure_on(chip="Apple M4")
    page = build_benchmark_page([make_measurement(), replace(second, tiers=second.tiers[:1])])
    text = ParsedPage(page.to_html()).text
    assert "2: Apple M4" in text
    assert "Apple M4, 2026-11-22" in text


def test_name_of_a_chip_is_escaped() -> None:
    html = build_benchmark_page([measure_on(chip=f"{HOSTILE} ![x](http://e.vil)")]).to_html()
    assert "<script" not in html
    assert "<img" not in html
