from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mlxgpt import api
from mlxgpt import display as displays
from mlxgpt import run as runs
from mlxgpt.appraisal import Appraisal
from mlxgpt.corpus.tokens import open_dataset
from mlxgpt.display import (
    PreparationDisplay,
    TrainingDisplay,
    duration,
    show_appraisal,
    show_laws,
    show_texts,
    size,
)
from mlxgpt.forecast import Forecast, Reached
from mlxgpt.launch import Summary
from mlxgpt.quality import METRICS
from mlxgpt.selfcheck import Law
from tests.commands import ROOT

RECORD = {
    "step": 1200,
    "loss": 1.5,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "tokens_per_second": 8123.4,
    "peak_share": 0.34,
    "memory_bytes": 412_000_000,
}


def shown(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trained: Path,
    *,
    terminal: bool,
    width: int = 120,
) -> str:
    """Everything a display writes in the course of a short training."""
    console = Console(
        stderr=True, force_terminal=terminal, width=width, highlight=False, no_color=True
    )
    monkeypatch.setattr(displays, "console", lambda: console)
    display = TrainingDisplay()
    run = runs.open_run(trained / "runs" / "done")
    display.law(Law("causality", True, "fine"))
    reached = Reached(1.5150, 2.186, 10_240_000, "a-report.md")
    forecast = Forecast(0.2, 12.0, 310_000_000, 5000, 10, reached)
    display.start(run, open_dataset(trained / "data" / "words"), 0, forecast)
    display.log(RECORD)
    display.log({**RECORD, "step": 1210, "val_loss": 1.75})
    display.sample(1210, "[bold]To be[/bold]\n:smile: or")
    display.log({**RECORD, "step": 1220})
    summary = Summary(
        run=run.folder,
        data=trained / "data" / "words",
        step=1220,
        steps=5000,
        loss=1.5,
        val_loss=1.75,
        best_step=1210,
        seconds=3725.0,
        interrupted=True,
        resumed=False,
        try_it="mlxgpt generate --run " + "x" * 100,
        warning="nothing is as it was asked for",
    )
    display.finish(summary)
    display.close()
    return capsys.readouterr().err


def test_plain_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path
) -> None:
    text = shown(monkeypatch, capsys, trained, terminal=False)
    assert "\x1b" not in text
    line = next(line for line in text.splitlines() if line.startswith("step 1,210"))
    for part in ("loss 1.5000", "val loss 1.7500", "lr 1.00e-03", "tokens/s 8,123"):
        assert part in line
    for part in ("of peak 34%", "memory 412 MB", "ETA"):
        assert part in line
    assert "text        words.txt\n" in text
    assert "step 1,200" not in text, "not a line for every record"
    assert "[bold]To be[/bold]\n    :smile: or" in text, "a sample is no markup"
    assert "about 18:40 and 310 MB of memory, measured: 200 ms a step, 10 evaluations" in text
    assert "val loss 1.5150, 2.186 bits per byte" in text
    assert "1,220 of 5,000 steps in 1:02:05" in text
    assert "mlxgpt generate --run " + "x" * 100 in text, "a command is not broken"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_gets_a_live_view_that_fits(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trained: Path,
    width: int,
) -> None:
    text = shown(monkeypatch, capsys, trained, terminal=True, width=width)
    assert "\x1b[" in text
    for part in ("val loss", "tokens/s", "of peak", "memory", "ETA", "8,123"):
        assert part in text
    assert "\x1b[?25h" in text, "the cursor comes back"


def test_no_color_is_respected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    colour = "\x1b[1;33m"
    for variable in ("FORCE_COLOR", "NO_COLOR"):  # the second one wins
        monkeypatch.setenv(variable, "1")
        TrainingDisplay().warn("beware")
        assert (colour in capsys.readouterr().err) == (variable == "FORCE_COLOR")


@pytest.mark.parametrize(("width", "rows"), [(110, 3), (60, 5)])
def test_the_live_view_has_a_bar_and_names_over_numbers(
    capsys: pytest.CaptureFixture[str], width: int, rows: int
) -> None:
    display = TrainingDisplay()
    display._steps, display._latest = 5000, RECORD
    display.console = Console(width=width, no_color=True)
    display.console.print(display._view())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == rows
    assert set(lines[0]) <= set("━╸╺ ")
    assert lines[1].split()[:2] == ["step", "loss"]
    assert lines[2].split()[:2] == ["1,200/5,000", "1.5000"]
    assert "8,123" in lines[-1]


def test_a_failed_law_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    TrainingDisplay().law(Law("causality", False, "sees ahead"))
    assert "causality: sees ahead" in capsys.readouterr().err


def test_laws_are_shown_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    laws = [Law("a", True, "[x] fine", why="because"), Law("b", False, "broken")]
    show_laws(laws)
    text = capsys.readouterr().out
    assert "ok" in text
    assert "[x] fine" in text
    assert "FAILED" in text
    assert "because" in text


def test_texts_are_set_to_be_read_in_a_terminal_and_left_alone_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    story = "word " * 40 + "\n\nThe [bold]end[/bold]."
    show_texts([story, "b"])
    assert capsys.readouterr().out == f"--- 1\n{story}\n\n--- 2\nb\n\n"
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    show_texts([story, "b"])
    lines = capsys.readouterr().out.splitlines()
    assert "1 of 2" in lines[0]
    assert max(len(line) for line in lines if "word" in line) <= 80, "a readable width"
    assert sum(line.count("word") for line in lines) == 40
    assert any("[bold]end[/bold]." in line for line in lines)


def test_an_appraisal_is_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    names = [metric.name for metric in METRICS]
    one = dict.fromkeys(names, 0.5)
    none: dict[str, float | None] = dict.fromkeys(names)
    other: dict[str, float | None] = {**one, "grammar errors per 100 words": None}
    both: dict[str, dict[str, float | None]] = {"model": {**other}, "real": {**other}}
    both["model"]["dictionary words"] = 0.987
    both["real"]["ended"] = both["model"]["ended"] = None
    show_appraisal(Appraisal("Once", 0.8, 0, both, 0.75, ["text"]))
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("dictionary words"))
    assert row.split()[2:4] == ["98.7%", "50.0%"]
    assert "75%" in text
    project = (ROOT / "pyproject.toml").read_text()
    (wanted,) = tomllib.loads(project)["project"]["optional-dependencies"]["quality"]
    assert f"pip install '{wanted}'" in text
    assert not any(line.startswith("ended") for line in text.splitlines()), "nobody has it"
    show_appraisal(Appraisal("", 0.8, 0, {"model": {**one}, "real": {**none, **one}}, None, []))
    text = capsys.readouterr().out
    assert "likelier" not in text
    assert "install" not in text


def test_a_preparation_shows_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 100.0, 105.0, 109.0, 122.0])
    monkeypatch.setattr(displays, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    display = PreparationDisplay()
    for done in (10e6, 60e6, 61e6, 120e6):
        display.progress("encoding", int(done), int(1000e6))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, "now and then"
    for part in ("encoding 120 MB of 1.0 GB", "5 MB/s", "memory", "ETA 2:56"):
        assert part in lines[0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3725, "1:02:05")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (412e6, "412 MB"), (1.5e9, "1.5 GB"), (3e15, "3000.0 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_a_whole_training_is_shown(
    home: Path, text_file: Path, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    api.train(config=tiny, source=text_file, run="r", display=TrainingDisplay())
    text = capsys.readouterr().err
    for part in (
        "preparing",
        "13 checks passed",
        "parameters: 2 layers",
        "12 steps of 32 tokens",
        "what it writes after 4 steps",
        "step 12/12",
        "done",
        "the best, at step",
        "mlxgpt generate --run runs/r",
    ):
        assert part in text
