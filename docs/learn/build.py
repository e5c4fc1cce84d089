"""Build the notebooks of docs/learn, in English and in Portuguese, from chapters/*.py.

    python docs/learn/build.py           run every chapter, and write its notebooks
    python docs/learn/build.py 3 4       only these chapters
    python docs/learn/build.py --check   run every chapter, and write nothing

A chapter is a Python file in jupytext's percent format. Its code is run once; a Markdown cell
belongs to the language in its metadata, or without one to both. Code cells with the tag `my_gpt`,
of all chapters, make up my_gpt.py, which later chapters import. A chapter fails if one of its cells
does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent
LANGUAGES = ("en", "pt")
MY_GPT = FOLDER / "my_gpt.py"
INSTALL = {
    "en": "To run this notebook, install mlxgpt from a checkout of its repository: "
    "`pip install -e '.[learn]'`, then open it in VS Code, or with `jupyter lab`.",
    "pt": "Para executar este notebook, instale o mlxgpt a partir de uma cópia do repositório: "
    "`pip install -e '.[learn]'`, e abra-o no VS Code ou com o `jupyter lab`.",
}
SETUP = """import sys

import mlxgpt  # before mlx: it loads a faster BLAS on Linux

sys.path.append("..")  # for my_gpt.py and course.py"""
MY_GPT_HEAD = '''"""The functions of all chapters, as they are at the end of the course."""

import math
from collections import Counter
from itertools import pairwise

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_unflatten

'''


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("chapters", nargs="*", type=int, metavar="CHAPTER")
    parser.add_argument("--check", action="store_true", help="run the chapters, and write nothing")
    args = parser.parse_args()
    # For matrices as small as these, more threads only cost time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    paths = find_chapters()
    if not args.check:
        MY_GPT.write_text(collect_my_gpt(paths), encoding="utf-8")
    for path in paths:
        if not args.chapters or int(path.stem[:2]) in args.chapters:
            print(path.stem, flush=True)
            try:
                notebooks = run_chapter(path)
            except CellExecutionError as error:
                sys.exit(f"{path.stem} fails:\n{error}")
            for language, notebook in notebooks.items() if not args.check else ():
                nbformat.write(notebook, FOLDER / language / f"{path.stem}.ipynb")


def find_chapters() -> list[Path]:
    """Sources of the chapters, in their order."""
    return sorted((FOLDER / "chapters").glob("*.py"))


def collect_my_gpt(paths: Iterable[Path]) -> str:
    """The text of my_gpt.py: all cells with the tag `my_gpt`."""
    parts = []
    for path in paths:
        cells = jupytext.read(path).cells
        sources = [c.source for c in cells if "my_gpt" in c.metadata.get("tags", ())]
        if sources:
            parts += [f"# Chapter {int(path.stem[:2])}", *sources]
    return MY_GPT_HEAD + "\n\n\n".join(parts).replace("\n\n\n\n", "\n\n\n") + "\n"


def make_notebooks(path: Path) -> dict[str, Any]:
    """The notebooks of a chapter by language, without outputs."""
    return {language: _select_language(jupytext.read(path), language) for language in LANGUAGES}


def _select_language(notebook: Any, language: str) -> Any:
    cells = [c for c in notebook.cells if c.metadata.get("lang", language) == language]
    title, *rest = cells
    setup = [nbformat.v4.new_markdown_cell(INSTALL[language]), nbformat.v4.new_code_cell(SETUP)]
    notebook.cells = [title, *setup, *rest]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def run_chapter(path: Path) -> dict[str, Any]:
    """Run a chapter's code once. Returns its notebooks with the outputs, by language.

    Raises:
        CellExecutionError: if a cell fails.
    """
    notebooks = make_notebooks(path)
    executed = notebooks[LANGUAGES[0]]
    resources = {"metadata": {"path": str(FOLDER / LANGUAGES[0])}}
    NotebookClient(executed, timeout=600, resources=resources).execute()
    outputs = [_clean_outputs(cell) for cell in executed.cells if cell.cell_type == "code"]
    for notebook in notebooks.values():
        code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for cell, (count, cell_outputs) in zip(code_cells, outputs, strict=True):
            cell.metadata = {}
            cell.execution_count, cell.outputs = count, cell_outputs
    return notebooks


def _clean_outputs(cell: Any) -> tuple[int, list[Any]]:
    """Execution count and outputs of a cell, with consecutive text joined."""
    outputs: list[Any] = []
    for output in cell.outputs:
        output.get("metadata", {}).clear()
        if outputs and output.output_type == outputs[-1].output_type == "stream":
            outputs[-1].text += output.text
        else:
            outputs.append(output)
    return cell.execution_count, outputs


if __name__ == "__main__":
    main()
