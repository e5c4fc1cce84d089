"""`mlxgpt learn`: the list of chapters, and the check of a reader's file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxgpt.cli.main import main
from tests.helpers.commands import ROOT

Capture = pytest.CaptureFixture[str]

WRONG = "def count_bigrams(ids, vocab_size):\n    return 0\n"


def test_chapters_are_listed_in_both_languages(capsys: Capture) -> None:
    assert main(["learn"]) == 0
    output = capsys.readouterr().out
    assert " 4  Heads, MLP, block / Cabeças, MLP, bloco" in output
    for line in output.splitlines()[1::2]:
        for path in line.split(", "):
            assert (ROOT / path.strip()).is_file()


def test_a_file_is_checked(home: Path, capsys: Capture) -> None:
    (home / "my_gpt.py").write_text(WRONG)
    assert main(["learn", "check", "1"]) == 1
    output = capsys.readouterr().out
    assert (
        "FAILED  counts every pair of neighbors\n        result of shape (), expected (3, 3)\n"
        in output
    )
    assert "missing: bigram_probabilities" in output
    assert main(["learn", "check", "1", "--file", str(ROOT / "docs/learn/my_gpt.py")]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_results_are_printed_as_json(home: Path, capsys: Capture) -> None:
    (home / "my_gpt.py").write_text(WRONG)
    assert main(["learn", "check", "1", "--json"]) == 1
    results = json.loads(capsys.readouterr().out)
    assert results[0]["problem"] == "result of shape (), expected (3, 3)"
    assert main(["learn", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[3]["slug"] == "04-block"


@pytest.mark.parametrize(
    ("line", "problem", "remedy"),
    [
        ("learn check", "which chapter?", "mlxgpt learn check N"),
        ("learn check 1", "my_gpt.py could not be read", "--file"),
        ("learn check 1 --file broken.py", "SyntaxError in line 1", "check again"),
        ("learn check 99 --file fine.py", "there is no chapter 99", "from 1 to 10"),
        ("learn test 1", "invalid choice: 'test'", "mlxgpt learn --help"),
    ],
)
def test_mistakes_give_a_two_line_error(
    home: Path, capsys: Capture, line: str, problem: str, remedy: str
) -> None:
    (home / "broken.py").write_text("def f(:\n")
    (home / "fine.py").write_text("")
    assert main(line.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert problem in lines[0]
    assert remedy in lines[1]
