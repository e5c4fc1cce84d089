from __future__ import annotations

import tomllib

import pytest

from mlxgpt.cli.tables import show_appraisal, show_checks, show_texts
from mlxgpt.evaluation.sample_quality import SampleQuality
from mlxgpt.evaluation.text_metrics import METRICS
from mlxgpt.training.selfcheck import CheckResult
from tests.helpers.commands import ROOT


def test_checks_are_shown_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    show_checks(
        [
            CheckResult("a", True, "[x] fine", why="because"),
            CheckResult("b", False, "broken"),
            CheckResult("c", None, "here"),
        ]
    )
    text = capsys.readouterr().out
    assert "ok" in text
    assert "[x] fine" in text
    assert "FAILED" in text
    assert "because" in text
    assert "info" in text


def test_texts_are_wrapped_in_a_terminal_and_verbatim_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    story = "word " * 40 + "\n\nThe [bold]end[/bold]."
    show_texts([story, "\n b\n"])
    assert capsys.readouterr().out == f"--- 1\n{story}\n\n--- 2\n\n b\n\n\n"
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    show_texts([story, "b"])
    lines = capsys.readouterr().out.splitlines()
    assert "1 of 2" in lines[0]
    assert max(len(line) for line in lines if "word" in line) <= 80, "a readable width"
    assert sum(line.count("word") for line in lines) == 40
    assert any("[bold]end[/bold]." in line for line in lines)


def test_sample_quality_is_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    names = [metric.name for metric in METRICS]
    complete = dict.fromkeys(names, 0.5)
    missing: dict[str, float | None] = dict.fromkeys(names)
    without_grammar: dict[str, float | None] = {**complete, "grammar errors per 100 words": None}
    columns: dict[str, dict[str, float | None]] = {
        "model": {**without_grammar},
        "real": {**without_grammar},
    }
    columns["model"]["dictionary words"] = 0.987
    columns["real"]["ended"] = columns["model"]["ended"] = None
    columns["real"]["quotes balanced"] = None
    show_appraisal(SampleQuality("Once", 0.8, 0, columns, 0.75, ["text"]))
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("dictionary words"))
    assert row.split()[2:4] == ["98.7%", "50.0%"]
    assert "75%" in text
    project = (ROOT / "pyproject.toml").read_text()
    (requirement,) = tomllib.loads(project)["project"]["optional-dependencies"]["quality"]
    assert f"pip install '{requirement}'" in text
    assert not any(line.startswith("ended") for line in text.splitlines()), "nobody has it"
    (row,) = (line for line in text.splitlines() if line.startswith("quotes balanced"))
    assert row.split()[2:4] == ["50.0%", "–"], "one of them has it"
    show_appraisal(
        SampleQuality(
            "", 0.8, 0, {"model": {**complete}, "real": {**missing, **complete}}, None, []
        )
    )
    text = capsys.readouterr().out
    assert "prefers" not in text
    assert "install" not in text
