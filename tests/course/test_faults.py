"""The answers of the course pass its checks, and each fault fails those of its chapter."""

from __future__ import annotations

from typing import Any

import faults
import pytest

from mlxgpt.learn.chapters import CHAPTERS
from mlxgpt.learn.checks import run_checks
from mlxgpt.learn.reader_file import load_functions

ALL_CHAPTERS = range(1, len(CHAPTERS) + 1)


def test_the_answers_pass_every_check() -> None:
    functions = load_functions(faults.MY_GPT)
    for chapter in ALL_CHAPTERS:
        results = run_checks(chapter, functions)
        assert results, f"chapter {chapter} has no check"
        assert [result for result in results if result.problem] == []


def failing_chapters(functions: dict[str, Any]) -> list[int]:
    return [
        chapter
        for chapter in ALL_CHAPTERS
        if any(result.problem for result in run_checks(chapter, functions))
    ]


@pytest.mark.parametrize("number", range(1, len(faults.FAULTS) + 1))
def test_each_fault_is_found_first_by_its_chapter(number: int) -> None:
    assert failing_chapters(faults.load_program(number))[0] == faults.FAULTS[number - 1].chapter


def test_there_are_twelve_different_faults() -> None:
    assert len({faults.make_faulty_source(number) for number in range(13)}) == 13
