"""Check that no message advises deleting the user's files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

# Messages advise moving files or choosing another name, never deleting the user's work.
DELETION_WORDS = re.compile(
    r"\b(delet|eras|wip(e|ing)\b|destroy|discard|trash|unlink|overwrit|throw(n)? away|get rid"
    r"|remov(e|es|ed|ing)\b|rm\b|clear (out|it|the folder)|empty the)",
    re.IGNORECASE,
)


def iter_messages(source: str) -> Iterator[str]:
    """Yield a module's strings of several words, without docstrings; … replaces f-string fields."""
    tree = ast.parse(source)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
            yield "".join(map(str, parts))
            skipped |= set(node.values)
        elif isinstance(node, ast.Constant) and node not in skipped and " " in str(node.value):
            yield str(node.value)


def iter_error_arguments(source: str) -> Iterator[str]:
    """Yield the arguments of a module's errors, including one-word strings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error"):
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                yield ast.unparse(argument)


PATHS = sorted((ROOT / "mlxgpt").rglob("*.py"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_message_advises_deleting_user_files(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    for text in (*iter_messages(source), *iter_error_arguments(source)):
        assert not DELETION_WORDS.search(text), text


@pytest.mark.parametrize(
    "line",
    [
        'raise UserError(f"{folder} exists", "choose another folder, --output DIR, or delete it.")',
        'raise UserError("x", f"remove {folder} first.")',
        'note(f"run: rm -r {folder}")',
    ],
)
def test_advice_to_delete_is_detected(line: str) -> None:
    assert any(
        DELETION_WORDS.search(text) for text in (*iter_messages(line), *iter_error_arguments(line))
    )


@pytest.mark.parametrize("page", ["docs/troubleshooting.md", "docs/datasets.md"])
def test_no_page_advises_deleting_user_files(page: str) -> None:
    assert not DELETION_WORDS.search((ROOT / page).read_text(encoding="utf-8"))
