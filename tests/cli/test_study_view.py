from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from mlxgpt.cli import progress as displays
from mlxgpt.cli.study_view import StudyDisplay, show_comparison, show_scaling
from mlxgpt.config import Config
from mlxgpt.experiments.verdict import assign_verdicts
from mlxgpt.training.selfcheck import CheckResult
from tests.helpers.comparisons import (
    make_comparison_record,
    make_scaling_record,
    make_variant_result,
    run_comparison,
)

pytestmark = pytest.mark.usefixtures("no_check")


def run_display(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Config, *, live: bool
) -> str:
    """Return everything that the display writes during a small comparison."""
    console = Console(stderr=True, force_terminal=live, width=100, highlight=False, no_color=True)
    monkeypatch.setattr(displays, "stderr_console", lambda: console)
    with StudyDisplay() as display:
        run_comparison(tiny, display, seeds=2)
    output = capsys.readouterr()
    assert output.out == "", "stdout is for results"
    return output.err


def test_without_a_terminal_one_line_per_run(
    home: Path,
    text_file: Path,
    tiny: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = run_display(monkeypatch, capsys, tiny, live=False).splitlines()
    trainings = [line for line in lines if "bits per byte" in line]
    assert len(trainings) == 4
    assert trainings[0].startswith("learning_rate=1e-2, seed 7  bits per byte ")
    assert "1 of 4 runs, about 0:" in trainings[0]
    assert "4 of 4 runs" in trainings[-1]


def test_in_a_terminal_a_growing_table(
    home: Path,
    text_file: Path,
    tiny: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = run_display(monkeypatch, capsys, tiny, live=True)
    for part in ("one seed", "learning_rate=1e-3, seed 8  step 12/12", "difference", "━"):
        assert part in text, part


def test_failed_self_check_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with StudyDisplay() as display:
        display.on_check(CheckResult("sums", True, "right"))
        display.on_check(CheckResult("products", False, "wrong"))
    stderr = capsys.readouterr().err
    assert "running self-checks" in stderr
    assert "self-check: products: wrong" in stderr
    assert "sums" not in stderr


def test_comparison_result_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (
        make_variant_result("a", [2.0, 2.1, 1.9]),
        make_variant_result("b[x]", [1.9, 2.0, 1.801]),
    )
    assign_verdicts([first, second], 0.05, sequential=False)
    show_comparison(make_comparison_record(first, second))
    output = capsys.readouterr()
    assert output.err == ""
    assert "b[x]" in output.out, "as it is, no markup"
    assert "better" in output.out
    assert "held out" in output.out


def test_scaling_study_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    show_scaling(make_scaling_record())
    output = capsys.readouterr()
    assert output.err == ""
    for part in ("5 × 320 (test)", "Law: bits per byte = 0.", "inside", "bits per byte, predicted"):
        assert part in output.out, part


def test_a_run_of_a_study_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal; a run that was reused gives none."""
    result = make_scaling_record().test
    with StudyDisplay() as display:
        display.on_result(result)
        display.on_variant_begin("5 × 320", 3, 900, 4, 13)
        display.on_result(result)
    lines = [line for line in capsys.readouterr().err.splitlines() if "bits per byte" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"5 × 320, 900 steps, seed 3  bits per byte {result.losses[-1]:.4f}")
    assert "5 of 13 runs" in lines[0]
