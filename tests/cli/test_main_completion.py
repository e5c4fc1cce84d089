"""Shell completion with argcomplete, called as a shell does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT


def complete(line: str, folder: Path) -> list[str]:
    """Return the completions of a command line with the cursor at its end."""
    answer = folder / "completions"
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "PYTHONPATH": str(ROOT),
    }
    code = "from mlxgpt.cli.main import run_and_exit; run_and_exit()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True)
    return answer.read_text().split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mlxgpt tr", ["train"]),
        ("mlxgpt train --learning-", ["--learning-rate"]),
        ("mlxgpt generate --top", ["--top-k", "--top-p"]),
        ("mlxgpt train --tier ", ["1", "2"]),
    ],
)
def test_shell_completion(line: str, expected: list[str], tmp_path: Path) -> None:
    assert complete(line, tmp_path) == expected
