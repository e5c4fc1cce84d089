"""What a GPU would be given, beside what MLX itself makes of the same functions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxgpt.config import Config, ModelConfig, override
from mlxgpt.machine import device
from mlxgpt.reports import graphs
from mlxgpt.reports.graphs import as_on_a_gpu, fused, graph_of, launched, leaves
from mlxgpt.training.step import new_step

TINY = ModelConfig(2, 2, 32, 16, 37, 0.0, False)
MODERN = {"position": "rope", "norm": "rms", "qk_norm": True, "mlp": "swiglu"}


def same(names: str) -> str:
    """One spelling of what the graph and its drawing call differently."""
    names = re.sub("Bitwise(And|Or|Xor)|LeftShift|RightShift", "BitwiseBinary", names)
    return names.replace("Rsqrt", "Sqrt").replace("Log2", "Log").replace("Log10", "Log")


def by_mlx(folder: Path, function: Callable[..., Any], *args: Any) -> tuple[Counter[str], int]:
    """The fused kernels that `mx.compile` makes, by what is in them; and how many nodes there are
    in all.
    """
    drawing = folder / "graph.dot"
    mx.eval(args)
    mx.export_to_dot(str(drawing), *leaves(mx.compile(function)(*args)))
    labels = re.findall(r'label ="([^"]*)"', drawing.read_text())
    made = [same(one.removeprefix("Compiled")) for one in labels if one.startswith("Compiled")]
    return Counter(made), len(labels)


def by_us(function: Callable[..., Any], *args: Any) -> tuple[Counter[str], int]:
    mx.eval(args)
    groups = fused(graph_of(function, *args)[0])
    made = [same("".join(one.name for one in group)) for group in groups if len(group) > 1]
    return Counter(made), len(groups)


@pytest.mark.parametrize(
    "changes", [{}, {"bias": True, "dropout": 0.1}, MODERN, {**MODERN, "tied": False}]
)
def test_a_training_step_is_fused_as_mlx_fuses_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    with as_on_a_gpu(in_training=True):
        step = new_step(override(Config(TINY), {"dtype": "float32", **changes}))
        mx.eval(step.state)
        ids = mx.zeros((4, 16), dtype=mx.int32)
        args = step.model.trainable_parameters(), ids, ids, mx.random.key(0)
        found = by_us(step._gradients_of, *args)
        assert sum(found[0].values()) > 10
        assert found == by_mlx(tmp_path, step._gradients_of, *args)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("+*se>bro"), st.integers(0, 40)), min_size=1, max_size=60)
)
def test_any_graph_is_fused_as_mlx_fuses_it(
    tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[str, int]]
) -> None:
    """Deep, wide, with results on the way, broadcasts and reductions between."""

    def function(x: mx.array, row: mx.array) -> list[mx.array]:
        made, results = [x, row + x], []
        for kind, number in plan:
            a, b = made[number % len(made)], made[-1]
            if kind == "o":
                results.append(b * 3 - a)
                continue
            if kind == "s":
                made.append(mx.sin(b))
            elif kind == "e":
                made.append(mx.exp(b) * 2)
            elif kind == "b":
                made.append(a + row)
            elif kind == "r":
                made.append(b - b.sum(axis=-1, keepdims=True))
            else:
                made.append({"+": a + b, "*": a * b, ">": mx.where(a > b, a, b)}[kind])
        return [*results, made[-1]]

    args = mx.ones((4, 8)), mx.ones((8,))
    assert by_us(function, *args) == by_mlx(tmp_path_factory.mktemp("dot"), function, *args)


def kernels(function: Callable[..., Any], *args: mx.array) -> list[tuple[str, int, int, int]]:
    mx.eval(args)
    made = launched(graph_of(function, *args)[0])
    return [(one.name, one.launches, one.bytes, one.flops) for one in made]


def test_bytes_and_operations_are_those_of_the_formula() -> None:
    a, b, row = mx.ones((8, 4)), mx.ones((4, 16)), mx.ones((16,))
    assert kernels(lambda a, b: a @ b, a, b) == [
        ("Matmul", 1, 4 * (8 * 4 + 4 * 16 + 8 * 16), 2 * 8 * 4 * 16)
    ]
    one = ("elementwise", 1, 4 * (4 * 16 + 16 + 4 * 16), 2 * 4 * 16)
    assert kernels(lambda x, row: mx.sin(x) * row, b, row) == [one], "a broadcast is read once"
    both = ("elementwise", 1, 4 * 3 * 4 * 16, 2 * 4 * 16)
    assert kernels(lambda x: (y := mx.sin(x), y * x), b) == [both], "two results are written"
    assert kernels(lambda x: x.sum(axis=1), b) == [("Reduce", 1, 4 * (64 + 4), 64)]


def test_views_cost_nothing_and_copies_what_they_copy() -> None:
    x = mx.ones((2, 3, 4))
    assert kernels(lambda x: x.reshape(6, 4), x) == []
    assert kernels(lambda x: x.transpose(1, 0, 2)[None], x) == []
    assert kernels(lambda x: x.transpose(1, 0, 2).reshape(6, 4), x) == [("Reshape", 1, 2 * 96, 0)]
    assert kernels(lambda x: x[:1].transpose(1, 0, 2).reshape(3, 4), x) == [], "nothing is moved"
    half = kernels(lambda x: mx.split(x, 2, axis=2)[0].reshape(-1), x)
    assert half == [("Reshape", 1, 2 * 48, 0)]


def test_a_gather_reads_the_rows_that_are_asked_for() -> None:
    table, ids = mx.ones((1000, 8)), mx.zeros((5,), dtype=mx.int32)
    ((name, launches, size, _),) = kernels(lambda t, i: t[i], table, ids)
    assert (name, launches, size) == ("Gather", 1, 4 * 5 + 2 * 4 * 5 * 8)


def test_fast_operations_are_one_kernel_and_two_in_training() -> None:
    x, w = mx.ones((2, 2, 8, 4)), mx.ones((4,))

    def norms(x: mx.array, w: mx.array) -> mx.array:
        x = mx.fast.layer_norm(x, w, None, 1e-5)
        x = mx.fast.rms_norm(x, None, 1e-5)
        return mx.fast.rope(x, 4, traditional=False, base=1e4, scale=1.0, offset=0)

    mx.eval(x, w)
    names = ["LayerNorm", "RMSNorm", "RoPE"]
    with as_on_a_gpu():
        graph, _ = graph_of(norms, x, w)
    assert [one.name for one in launched(graph)] == names
    assert launched(graph)[0].bytes == 4 * (2 * x.size + 4)
    trained = [one.name for one in launched(graph, in_training=True)]
    assert trained == [*names, *(f"{name}, backward" for name in names)]
    with as_on_a_gpu(in_training=True):
        assert [one.name for one in launched(graph_of(norms, x, w)[0])] == names


def test_attention_is_one_kernel_but_in_training() -> None:
    q = mx.ones((2, 2, 8, 4))
    mx.eval(q)

    def attention(q: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, q + 1, q + 2, scale=0.5, mask="causal")

    with as_on_a_gpu():
        ((name, _, size, flops),) = [k for k in kernels(attention, q) if k[0] == "Attention"]
    assert (name, size, flops) == ("Attention", 4 * 4 * q.size, 4 * q.size * 8)
    with as_on_a_gpu(in_training=True):
        names = Counter(name for name, *_ in kernels(attention, q))
    assert names["Matmul"] == 2
    assert names["Softmax"] == 1
    assert not names["Attention"]


def test_pretending_ends() -> None:
    before = mx.fast.rms_norm
    with as_on_a_gpu():
        assert mx.fast.rms_norm is not before
        assert not graphs.device.on_cpu()
    assert mx.fast.rms_norm is before
    assert graphs.device.on_cpu() == device.on_cpu()
