from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlxgpt import api
from mlxgpt.cli import main as cli
from mlxgpt.html_report import report
from mlxgpt.html_report.page import GENERATOR_META
from mlxgpt.storage.run import open_run
from mlxgpt.utils.files import MAX_SMALL_FILE_BYTES
from tests.helpers.commands import ROOT, Capture, expect_error

BENCH = ROOT / "benchmarks" / "reports" / "2026-11-26-epyc-2-cores.json"
COMPARISONS = ROOT / "benchmarks" / "reports" / "compare"


def test_report_of_the_newest_run_is_in_its_folder(place: Path, capsys: Capture) -> None:
    assert cli.main(["report"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == Path("runs/done/report.html")
    assert "<title>done</title>" in path.read_text()
    assert cli.main(["generate", "--max-tokens", "2"]) == 0, "the report does not affect the run"
    assert cli.main(["report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"page": str(path)}


def test_several_runs_and_output_path(place: Path) -> None:
    shutil.copytree("runs/done", "runs/other")
    assert api.report("done", "other") == Path("report.html")
    assert "<title>done, other</title>" in Path("report.html").read_text()
    Path("pages").mkdir()
    assert api.report("runs/other", output="pages/mine.html") == Path("pages/mine.html")


@pytest.mark.parametrize("path", [BENCH, *sorted(COMPARISONS.glob("*.json"))], ids=lambda p: p.stem)
def test_page_of_every_json_report_in_benchmarks(home: Path, path: Path) -> None:
    shutil.copy(path, "a.json")
    html = api.report("a.json").read_text()
    assert api.report("a.json") == Path("a.html")
    assert html.count("<svg") >= 2
    assert len(html) < 2e6


def test_page_of_several_benchmarks(home: Path) -> None:
    html = api.report(BENCH, BENCH, output="both.html").read_text()
    assert "2: AMD EPYC" in html


def test_invalid_targets_are_refused(place: Path, capsys: Capture) -> None:
    Path("a.json").write_text("{}")
    Path("list.json").write_text('["variants"]')
    Path("mine.html").write_text("my page")
    for line, problem in (
        (["nobody"], "there is no run named 'nobody'"),
        (["done", "a.json"], "a report covers either runs or JSON files"),
        (["a.json", "--watch"], "a report covers either runs or JSON files"),
        (["a.json"], "a.json: this is not a valid benchmark result"),
        (["list.json"], "not a valid comparison result"),
        (["none.json"], "cannot read none.json: No such file"),
        (
            ["done", "--output", "mine.html"],
            "mine.html exists and was not written by mlxgpt report",
        ),
        (["done", "--output", "no/where.html"], "cannot write no/where.html"),
    ):
        assert problem in expect_error(capsys, "report", *line)
    comparisons = [str(path) for path in sorted(COMPARISONS.glob("*.json"))[:2]]
    assert "several comparisons" in expect_error(capsys, "report", *comparisons)
    shutil.rmtree("runs")
    assert "no runs found in" in expect_error(capsys, "report")


@pytest.mark.parametrize("file", ["config.toml", "tokenizer.json", "run.json"])
def test_damaged_run_is_reported(place: Path, capsys: Capture, file: str) -> None:
    Path("runs/done", file).write_text("{")
    assert file in expect_error(capsys, "report", "done")


def test_watch_ends_when_the_run_is_finished(
    place: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    metrics = Path("runs/done/metrics.jsonl")
    lines = metrics.read_text().splitlines(keepends=True)
    path = Path("runs/done/report.html")
    pages: list[str] = []

    def continue_run(seconds: float) -> None:
        assert seconds == report.WATCH_INTERVAL
        pages.append(path.read_text())
        metrics.write_text("".join(lines[: len(lines) - 3 + len(pages)]))

    monkeypatch.setattr(report.time, "sleep", continue_run)
    metrics.write_text("".join(lines[:-3]))
    assert api.report("done", watch=True) == path
    assert len(pages) == 3
    assert all('http-equiv="refresh"' in html for html in pages)
    assert pages[0] != pages[1]
    assert "refresh" not in path.read_text()
    assert notes == [f"updating {path} every 10 seconds; press Ctrl-C to stop"]


def test_ctrl_c_ends_watch_with_a_final_page(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Path("runs/done/metrics.jsonl")
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", interrupted)
    assert cli.main(["report", "--watch"]) == 0
    html = Path("runs/done/report.html").read_text()
    assert GENERATOR_META in html
    assert "refresh" not in html


def test_page_of_a_long_run_is_small(place: Path) -> None:
    """At most 2 MB for 100,000 records; benchmarks/pages.py measures the time."""
    run = open_run(Path("runs/done"))
    record: dict[str, Any] = {"lr": 1e-3, "grad_norm": 0.5, "peak_share": 0.3, "skipped": 0}
    with (run.folder / "metrics.jsonl").open("w") as file:
        for n in range(1, 100_001):
            validation = {"val_loss": 3 - n / 1e5} if n % 100 == 0 else {}
            numbers = {"loss": 3 + n % 7 / 7 - n / 1e5, "tokens_per_second": 1e4 + n % 13}
            file.write(json.dumps({"step": n, **numbers, **record, **validation}) + "\n")
    with (run.folder / "samples.txt").open("w") as file:
        for n in range(1000):
            file.write(f"--- step {100 * n}\n" + 5000 * "<word> " + "\n\n")
    page = api.report("done")
    assert page.stat().st_size < 2e6
    assert (run.folder / "metrics.jsonl").stat().st_size > MAX_SMALL_FILE_BYTES
