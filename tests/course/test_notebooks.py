"""Test that the notebooks of docs/learn are those of its chapters, in both languages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import build
import pytest

from mlxgpt.learn.chapters import CHAPTERS

CODE_LINES = 125  # of a chapter, without imports and plots
NOT_COUNTED = re.compile(r"\s*(import |from |\w+,$|figure|axes|axis|image|plt)")
PATHS = build.find_chapters()


def read_cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def read_notebook(language: str, path: Path) -> Any:
    return json.loads((build.FOLDER / language / f"{path.stem}.ipynb").read_text(encoding="utf-8"))


def test_every_chapter_of_the_list_has_a_source() -> None:
    numbered = [path.stem for path in PATHS if int(path.stem[:2]) <= len(CHAPTERS)]
    assert numbered == [chapter.slug for chapter in CHAPTERS]


def test_my_gpt_is_collected_from_the_chapters() -> None:
    assert build.MY_GPT.read_text(encoding="utf-8") == build.collect_my_gpt(PATHS)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebooks_are_current(path: Path) -> None:
    for language, expected in build.make_notebooks(path).items():
        notebook = read_notebook(language, path)
        assert read_cells(notebook) == read_cells(expected), "run: python docs/learn/build.py"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebooks_were_run_without_errors_and_have_a_plot(path: Path) -> None:
    for language in build.LANGUAGES:
        cells = read_notebook(language, path)["cells"]
        code_cells = [cell for cell in cells if cell["cell_type"] == "code"]
        assert all(cell["execution_count"] for cell in code_cells)
        outputs = [output for cell in code_cells for output in cell["outputs"]]
        assert not [output for output in outputs if output["output_type"] == "error"]
        assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_chapters_are_short_and_in_both_languages(path: Path) -> None:
    notebooks = build.make_notebooks(path)
    kinds = {
        language: [kind for kind, _ in read_cells(notebook)]
        for language, notebook in notebooks.items()
    }
    assert kinds["en"] == kinds["pt"]
    code = [source for kind, source in read_cells(notebooks["en"]) if kind == "code"]
    lines = [line for source in code for line in source.splitlines() if line.strip()]
    assert len([line for line in lines if not NOT_COUNTED.match(line)]) <= CODE_LINES


@pytest.mark.parametrize("path", PATHS[: len(CHAPTERS)], ids=lambda path: path.stem)
def test_chapters_end_with_their_check(path: Path) -> None:
    cells = read_cells(build.make_notebooks(path)["en"])
    last_code = [source for kind, source in cells if kind == "code"][-1]
    assert last_code == f"check({int(path.stem[:2])}, globals())"
