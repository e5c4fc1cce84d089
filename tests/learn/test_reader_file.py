"""A reader's file is run like a script, and its errors are shown in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlxgpt.learn.reader_file import load_functions
from mlxgpt.utils.errors import UserError


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (None, "could not be read: No such file or directory"),
        ("def f(:\n", "SyntaxError in line 1"),
        ("import sys\n\nsys.exit()\n", "SystemExit (line 3 of my_gpt.py)"),
        ("open('gone.txt')\n", "FileNotFoundError: [Errno 2]"),
        ("x = 1\nraise KeyError('no')\n", "KeyError: 'no' (line 2 of my_gpt.py)"),
    ],
)
def test_a_file_that_does_not_run_is_refused(
    source: str | None, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "my_gpt.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(UserError) as error:
        load_functions(path)
    assert problem in error.value.problem


def test_a_file_imports_others_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "reader_head.py").write_text("def attend(q, k, v):\n    return v\n")
    (tmp_path / "my_gpt.py").write_text("from reader_head import attend\n")
    assert load_functions(tmp_path / "my_gpt.py")["attend"](1, 2, 3) == 3
    assert str(tmp_path) not in sys.path
