"""Limit the number of parameters of functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import mlxgpt
from tests.helpers.commands import ROOT

MAX_PARAMETERS = 8
MANY, FUNCTIONS_WITH_MANY = 6, 8  # at most 8 functions may have more than 6

Function = ast.FunctionDef | ast.AsyncFunctionDef


def iter_functions() -> Iterator[tuple[str, Function]]:
    for path in sorted((ROOT / "mlxgpt").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def count_parameters(node: Function) -> int:
    """Count parameters without self and cls; in the public API, without keyword-only ones."""
    arguments = node.args
    positional = [
        p.arg for p in (*arguments.posonlyargs, *arguments.args) if p.arg not in ("self", "cls")
    ]
    keyword_only = (
        []
        if node.name in mlxgpt.__all__
        else [*arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    )
    return len(positional) + sum(p is not None for p in keyword_only)


def test_no_function_has_more_than_eight_parameters() -> None:
    counts = {name: count_parameters(node) for name, node in iter_functions()}
    assert len(counts) > 500
    assert {name: count for name, count in counts.items() if count > MAX_PARAMETERS} == {}


def test_few_functions_have_more_than_six_parameters() -> None:
    many = [name for name, node in iter_functions() if count_parameters(node) > MANY]
    assert len(many) <= FUNCTIONS_WITH_MANY, many


def test_parameters_are_counted() -> None:
    (node,) = ast.parse("def f(self, a, /, b, *c, d, e=1, **g): pass").body
    assert isinstance(node, Function)
    assert count_parameters(node) == 6
