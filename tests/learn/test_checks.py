"""The checks of the course: the answers pass, and each fault fails its chapter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlxgpt.learn.chapters import CHAPTERS
from mlxgpt.learn.checks import load_functions, run_checks
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import ROOT

LEARN = ROOT / "docs" / "learn"
sys.path.append(str(LEARN))  # faults.py is a script beside the chapters

import faults  # noqa: E402

ALL_CHAPTERS = range(1, len(CHAPTERS) + 1)


def failing_chapters(functions: dict) -> list[int]:
    return [
        chapter
        for chapter in ALL_CHAPTERS
        if any(result.problem for result in run_checks(chapter, functions))
    ]


def test_the_answers_pass_every_check() -> None:
    functions = load_functions(LEARN / "my_gpt.py")
    for chapter in ALL_CHAPTERS:
        results = run_checks(chapter, functions)
        assert results, f"chapter {chapter} has no check"
        assert [r for r in results if r.problem] == []


@pytest.mark.parametrize("number", range(1, len(faults.FAULTS) + 1))
def test_each_fault_is_found_first_by_its_chapter(number: int) -> None:
    assert failing_chapters(faults.load_program(number))[0] == faults.FAULTS[number - 1].chapter


def test_there_are_twelve_different_faults() -> None:
    assert len({faults.make_faulty_source(number) for number in range(13)}) == 13


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


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (None, "could not be read: No such file or directory"),
        ("def f(:\n", "SyntaxError in line 1"),
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


@pytest.mark.parametrize("chapter", [0, 11, -1])
def test_a_chapter_that_does_not_exist_is_refused(chapter: int) -> None:
    with pytest.raises(UserError, match="use a number from 1 to 10"):
        run_checks(chapter, {})
