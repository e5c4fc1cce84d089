from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from baselines import report
from baselines.records import MLXGPT, Comparison, TaskResult

from tests.helpers import bench_measurement
from tests.helpers.bench_measurement import table_cells
from tests.helpers.commands import ROOT

COMMITTED = ROOT / "benchmarks" / "reports" / "2026-11-26-epyc-2-cores.json"


def make_comparison(*results: TaskResult) -> Comparison:
    return Comparison(
        "2026-11-22T23:59:58+00:00", bench_measurement.make_measurement().machine, results
    )


def render_results(*results: TaskResult) -> str:
    return report.render_markdown(make_comparison(*results))


def round_values(**changes: float) -> dict[str, Any]:
    return {
        "tokens_per_second": 100.0,
        "ms_to_first_token": 10.0,
        "seconds_from_start": 1.0,
        "peak_memory": 200e6,
        **changes,
    }


def test_report_without_results_describes_only_the_machine() -> None:
    text = render_results()
    assert table_cells(text, "chip") == ["Intel(R) Xeon(R) Processor"]
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Versions"]


def test_ratios_above_one_mean_faster_or_smaller() -> None:
    rounds = {
        "mlxgpt": [round_values(tokens_per_second=x) for x in (90.0, 100.0, 110.0)],
        "PyTorch": [round_values(tokens_per_second=50.0, peak_memory=500e6)] * 3,
    }
    made_with = {
        "PyTorch": {"versions": "torch 2.13", "device": "cpu", "threads": "2", "BLAS": "mkl"}
    }
    text = render_results(TaskResult("tier1", "training", 0, rounds, made_with))
    assert table_cells(text, "mlxgpt", 1) == ["100 (90.0 to 110)", "", "200 (200 to 200)", ""]
    assert table_cells(text, "PyTorch") == [
        "50.0 (50.0 to 50.0)",
        "2.00",
        "500 (500 to 500)",
        "2.50",
    ]
    assert table_cells(text, "PyTorch", 1) == ["torch 2.13", "cpu", "2", "mkl", ""]
    assert "3 rounds" in text


def test_generation_has_a_row_for_each_batch_size() -> None:
    slow = round_values(tokens_per_second=25.0, ms_to_first_token=30.0, seconds_from_start=4.0)
    rounds = {"mlxgpt": [round_values()], "transformers": [slow]}
    results = [TaskResult("tier1", "generate", n, rounds) for n in (1, 64)]
    text = render_results(*results)
    row = table_cells(text, "64, transformers")
    assert row[1::2] == ["4.00", "3.00", "4.00", "1.00"]
    assert table_cells(text, "1, mlxgpt")[0] == "100 (100 to 100)"


def test_learning_is_the_time_to_the_lowest_common_loss() -> None:
    rounds = {
        "mlxgpt": [{"curve": [[1.0, 4.0], [2.0, 3.0], [3.0, 2.0]]}],
        "PyTorch": [{"curve": [[2.0, 4.0], [4.0, 3.0], [6.0, 2.5]]}],
    }
    text = render_results(TaskResult("tier1", "learning", 0, rounds))
    assert table_cells(text, "mlxgpt", 1) == ["2.0000", "2.50 (2.50 to 2.50)", ""], (
        "half way from 3 to 2"
    )
    assert table_cells(text, "PyTorch") == ["2.5000", "6.00 (6.00 to 6.00)", "2.40"]


@pytest.mark.parametrize(
    ("curve", "seconds"),
    [
        ([[1.0, 2.0], [2.0, 1.0]], 1.0),  # from the first point
        ([[1.0, 4.0], [2.0, 2.0], [3.0, 5.0], [5.0, 1.0]], 4.0),  # permanently, not just once
    ],
)
def test_target_loss_must_be_reached_permanently(curve: list[list[float]], seconds: float) -> None:
    assert report._seconds_to_loss(3.0, curve) == pytest.approx(seconds)


def test_failed_framework_is_named() -> None:
    rounds = {"mlxgpt": [round_values()]}
    result = TaskResult("tier2", "training", 0, rounds, {}, {"mlx-lm": "no room"})
    assert "- mlx-lm could not do tier2, training: no room" in render_results(result)


def test_report_files_are_written_and_read(tmp_path: Path) -> None:
    original = make_comparison(TaskResult("tier1", "training", 0, {MLXGPT: [round_values()]}))
    for number in ("", "-2"):
        paths = report.write_comparison(original, tmp_path)
        assert [path.name for path in paths] == [
            f"2026-11-22-xeon-2-cores-baselines{number}{suffix}" for suffix in (".json", ".md")
        ]
        assert Comparison.from_json(paths[0].read_text(encoding="utf-8")) == original
        assert paths[1].read_text(encoding="utf-8") == report.render_markdown(original)


def test_results_in_a_bench_report_are_read() -> None:
    text = COMMITTED.read_text(encoding="utf-8")
    results = Comparison.from_json(text).results
    assert len(results) == len(json.loads(text)["contests"])
    assert {r.task for r in results} == {"training", "generate", "learning", "preparation"}
