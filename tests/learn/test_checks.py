"""What the checks of the course report; tests/course has those of its answers and faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxgpt.learn.checks import run_checks
from mlxgpt.learn.reader_file import load_functions
from mlxgpt.utils.errors import UserError


def test_missing_functions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "my_gpt.py"
    path.write_text("def gelu(x):\n    return x\n")
    first, second = run_checks(4, load_functions(path))
    assert first.problem == "missing: layer_norm"
    assert second.problem == "missing: block"


def test_an_error_in_a_function_is_shown_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "my_gpt.py"
    path.write_text("def attend(q, k, v):\n    return q @ k\n")
    for result in run_checks(3, load_functions(path)):
        assert result.problem is not None
        assert result.problem.startswith("ValueError: ")
        assert result.problem.endswith("(line 2 of my_gpt.py)")


def test_a_result_of_another_shape_is_described() -> None:
    first, *_ = run_checks(1, {"count_bigrams": lambda ids, vocab_size: ids})
    assert first.problem == "result of shape (6,), expected (3, 3)"


def test_a_result_that_is_not_a_number_fails() -> None:
    results = run_checks(3, {"attend": lambda q, k, v: v * float("nan")})
    assert all(result.problem for result in results)


@pytest.mark.parametrize("chapter", [0, 11, -1])
def test_a_chapter_that_does_not_exist_is_refused(chapter: int) -> None:
    with pytest.raises(UserError, match="use a number from 1 to 10"):
        run_checks(chapter, {})
