"""No function takes many parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import mlxgpt
from tests.helpers.commands import ROOT

MOST = 8
MANY, FUNCTIONS_WITH_MANY = 6, 8  # at most 8 functions may take more than 6

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    for path in sorted((ROOT / "mlxgpt").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def parameters(node: Function) -> int:
    """Without self and cls; of the public API, those that are not keyword-only."""
    a = node.args
    by_position = [p.arg for p in (*a.posonlyargs, *a.args) if p.arg not in ("self", "cls")]
    others = [] if node.name in mlxgpt.__all__ else [*a.kwonlyargs, a.vararg, a.kwarg]
    return len(by_position) + sum(p is not None for p in others)


def test_no_function_takes_more_than_eight_parameters() -> None:
    counts = {name: parameters(node) for name, node in functions()}
    assert len(counts) > 500
    assert {name: count for name, count in counts.items() if count > MOST} == {}


def test_few_functions_take_more_than_six_parameters() -> None:
    many = [name for name, node in functions() if parameters(node) > MANY]
    assert len(many) <= FUNCTIONS_WITH_MANY, many


def test_parameters_are_counted() -> None:
    (node,) = ast.parse("def f(self, a, /, b, *c, d, e=1, **g): pass").body
    assert isinstance(node, Function)
    assert parameters(node) == 6
