"""What a GPU would be given of a function: MLX's own graph of it, traced and never computed, fused
as `mx.compile` fuses it, and counted as kernels. So what a change costs on Metal can be seen where
there is none.

`fused` follows MLX 0.32's compile.cpp, and `tests/reports/test_graphs.py` compares it with what MLX
itself makes of the same functions. Two things that the CPU would trace otherwise are put right:
each of MLX's fast operations, which only a GPU has whole, is marked as one (see `as_on_a_gpu`), and
our own switch for what is the CPU's (`on_cpu`) says no.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from unittest import mock

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlxgpt.backend import ops
from mlxgpt.machine import device
from mlxgpt.reports.records import Kernel

# compile.cpp's: what is fused, how deep, and out of how many arrays.
ELEMENTWISE = {
    *("Abs", "Add", "ArcCos", "ArcCosh", "ArcSin", "ArcSinh", "ArcTan", "ArcTan2", "ArcTanh"),
    *("AsType", "BitwiseBinary", "BitwiseInvert", "Ceil", "Conjugate", "Cos", "Cosh", "Divide"),
    *("Equal", "Erf", "ErfInv", "Exp", "Expm1", "Floor", "Greater", "GreaterEqual", "Imag", "Less"),
    *("LessEqual", "Log", "Log1p", "LogAddExp", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum"),
    *("Minimum", "Multiply", "Negative", "NotEqual", "Power", "Real", "Remainder", "Round"),
    *("Select", "Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Square", "Subtract", "Tan", "Tanh"),
}
FUSABLE = ELEMENTWISE | {"Broadcast"}
DEPTH, ARRAYS = 11, 24

# These only look at what is there in another way.
VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "Depends", "ExpandDims", "Slice", "Split"),
    *("Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}
RESHAPES = {"Reshape", "Flatten", "Contiguous"}  # views of what lies in a row, copies of the rest
# Those that first copy, or fill, what they then write a part of.
TWO_KERNELS = {"Scatter", "ScatterAxis", "SliceUpdate", "DynamicSliceUpdate", "Pad"}
PRODUCTS = {"Matmul", "AddMM"}

# MLX's fast operations, and the numbers that mark them in a graph.
FAST = {
    "layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
    "rope": "RoPE",
    "scaled_dot_product_attention": "Attention",
}
MARKS = {1e6 + number: name for number, name in enumerate(FAST.values())}
CODES = {name: code for code, name in MARKS.items()}


@dataclass(frozen=True)
class Array:
    """An array of the graph: its shape, and the bytes of one of its numbers."""

    name: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Operation:
    """One primitive of MLX's."""

    name: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Graph:
    """A function's operations, each after those whose results it takes."""

    inputs: tuple[Array, ...]
    constants: tuple[Array, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[Array, ...]


# MLX cannot export functions with gradients of their own; these have the same matrix products.
PLAIN_PRODUCTS: dict[str, Callable[..., mx.array]] = {
    "matmul": lambda x, weight: x @ weight.T,
    "matmul_plus_bias": lambda x, weight, bias: mx.addmm(bias, x, weight.T),
}


@contextmanager
def as_on_a_gpu(*, in_training: bool = False) -> Iterator[None]:
    """While this lasts, what is traced is what a GPU would be given. It is not to be computed. The
    gradient of an embedding is counted as MLX's own, since MLX cannot export ours.

    Args:
        in_training: whether it will be differentiated: Metal then takes attention apart, as the
            CPU does (`ScaledDotProductAttention::use_fallback` in MLX's sources).
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(device, "on_cpu", _no))
        stack.enter_context(mock.patch.object(ops, "lookup", lambda weight, ids: weight[ids]))
        for fast, name in FAST.items():
            if not (in_training and name == "Attention"):
                stack.enter_context(mock.patch.object(mx.fast, fast, partial(_marked, name)))
        for name, plain in PLAIN_PRODUCTS.items():
            stack.enter_context(mock.patch.object(ops, name, plain))
        yield


def _no() -> bool:
    return False


def _marked(name: str, x: mx.array, *others: Any, **given: Any) -> mx.array:
    """A mark in the graph, of x's shape, that depends on the arrays among the others."""
    arrays = [a for a in (*others, *given.values()) if isinstance(a, mx.array)]
    return cast(list[mx.array], mx.depends([x], [*arrays, mx.array(CODES[name])]))[0]


def leaves(tree: Any) -> list[mx.array]:
    """A tree's arrays."""
    return [array for _, array in cast(list[tuple[str, mx.array]], tree_flatten(tree))]


def graph_of(function: Callable[..., Any], *args: Any) -> tuple[Graph, Any]:
    """What MLX traces of a function of arrays, or trees of them; and its result, as zeros."""
    parts: dict[str, list[Any]] = defaultdict(list)
    result: Any = None

    def take(event: dict[str, Any]) -> None:
        parts[event["type"]].append(event)

    def of_arrays(*arrays: mx.array) -> list[mx.array]:
        nonlocal result
        following = iter(arrays)
        result = function(*tree_map(lambda _: next(following), args))
        return leaves(result)

    mx.export_function(take, of_arrays, *leaves(args))

    def arrays(told: Iterable[tuple[str, tuple[int, ...], mx.Dtype]]) -> tuple[Array, ...]:
        return tuple(Array(name, tuple(shape), dtype.size) for name, shape, dtype in told)

    constants = [pair for event in parts["constants"] for pair in event["constants"]]
    marks = {
        name: MARKS[float(value)]
        for name, value in constants
        if value.ndim == 0 and float(value) in MARKS
    }
    operations = []
    for event in parts["primitive"]:
        inputs = arrays(event["inputs"])
        name = event["name"]
        if name == "Depends":
            name = next((marks[a.name] for a in inputs if a.name in marks), name)
            inputs = tuple(a for a in inputs if a.name not in marks)
        operations.append(
            Operation(name, inputs, arrays(event["outputs"]), tuple(event["arguments"]))
        )
    graph = Graph(
        arrays(parts["inputs"][0]["inputs"]),
        arrays((name, value.shape, value.dtype) for name, value in constants),
        tuple(operations),
        arrays(parts["outputs"][0]["outputs"]),
    )
    return graph, tree_map(lambda array: mx.zeros(array.shape, array.dtype), result)


@dataclass
class _Node:
    """An operation in the making of a fused graph; broadcasts are split, so it has an identity."""

    operation: Operation
    inputs: list[Any]  # nodes, or arrays that come from outside
    parents: list[_Node] = field(default_factory=list)
    is_output: bool = False

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def shape(self) -> tuple[int, ...]:
        return self.operation.outputs[0].shape


def fused(graph: Graph) -> list[list[Operation]]:
    """The graph's operations in groups, each of which `mx.compile` makes one kernel of."""
    nodes = _nodes(graph)
    done: set[_Node] = set()
    groups: list[list[Operation]] = []
    for node in reversed(nodes):
        if node in done:
            continue
        inside = _fusable_from(node, done) if node.operation.name != "Broadcast" else {}
        if len(inside) <= 1:
            groups.append([node.operation])
            continue
        _replace(node, inside)
        done |= inside.keys()
        groups.append([one.operation for one in _in_order(node, inside)])
    return groups[::-1]


def _nodes(graph: Graph) -> list[_Node]:
    made: dict[str, _Node] = {}
    outputs = {array.name for array in graph.outputs}
    nodes = []
    for operation in graph.operations:
        inputs = [made.get(array.name, array.name) for array in operation.inputs]
        node = _Node(operation, inputs, is_output=any(a.name in outputs for a in operation.outputs))
        for child in inputs:
            if isinstance(child, _Node):
                child.parents.append(node)
        made |= dict.fromkeys((a.name for a in operation.outputs), node)
        nodes.append(node)
    return nodes


def _fusable_from(top: _Node, done: set[_Node]) -> dict[_Node, None]:
    """What is fused with `top`, as compile.cpp's first recursion finds it."""
    inside: dict[_Node, None] = {}
    outside: set[Any] = set()

    def visit(node: Any, depth: int) -> None:
        if not isinstance(node, _Node) or node in done:
            outside.add(node)
            return
        if node in inside:
            return
        if (
            depth >= DEPTH
            or node.operation.name not in FUSABLE
            or (node.is_output and node.shape != top.shape)
        ):
            outside.add(node)
            return
        if depth and not all(above in inside for above in node.parents):
            if node.operation.name == "Broadcast" and len(outside) < ARRAYS:
                visit(_split(node, inside), depth)
            else:
                outside.add(node)
            return
        if node.is_output:
            outside.add(node)
        else:
            outside.discard(node)
        if len(outside) >= ARRAYS:
            return
        inside[node] = None
        for child in list(node.inputs):
            visit(child, depth + 1)

    visit(top, 0)
    return inside


def _split(node: _Node, inside: dict[_Node, None]) -> _Node:
    """A second one of a broadcast, for its parents in `inside`."""
    twin = _Node(node.operation, list(node.inputs), [p for p in node.parents if p in inside])
    node.parents = [p for p in node.parents if p not in inside]
    for parent in twin.parents:
        parent.inputs = [twin if child is node else child for child in parent.inputs]
    for child in twin.inputs:
        if isinstance(child, _Node):
            child.parents.append(twin)
    return twin


def _replace(top: _Node, inside: dict[_Node, None]) -> None:
    """What was fused is one operation now: its inputs have `top` as their parent."""
    for node in inside:
        for child in node.inputs:
            if isinstance(child, _Node) and child not in inside:
                child.parents = [p for p in child.parents if p not in inside] + [top]
        if node is not top and node.is_output:
            node.parents = [p for p in node.parents if p not in inside]


def _in_order(top: _Node, inside: dict[_Node, None]) -> list[_Node]:
    seen: dict[_Node, None] = {}

    def visit(node: Any) -> None:
        if isinstance(node, _Node) and node in inside and node not in seen:
            for child in node.inputs:
                visit(child)
            seen[node] = None

    visit(top)
    return list(seen)


def launched(graph: Graph, *, in_training: bool = False) -> list[Kernel]:
    """The kernels that Metal launches for a graph.

    Args:
        in_training: whether the graph has gradients: MLX's fast operations then have a second
            kernel for theirs, which the marks have not.
    """
    own = _Owners(graph)
    made: list[Kernel] = []
    for group in fused(graph):
        for operation in group:
            own.take(operation)
        made += _kernels_of(group, own)
    if in_training:
        backward = [k for k in made if k.name in MARKS.values()]
        made += [Kernel(f"{k.name}, backward", 2 * k.bytes, 2 * k.flops) for k in backward]
    return made


def operations(graph: Graph) -> int:
    """How many operations a graph has, without those that only look at what is there."""
    return sum(one.name not in VIEWS for one in graph.operations)


class _Owners:
    """Which array's memory a view looks at, and whether its numbers lie there in a row."""

    def __init__(self, graph: Graph) -> None:
        self.results = {array.name for array in graph.outputs}
        self._root: dict[str, Array] = {a.name: a for a in (*graph.inputs, *graph.constants)}
        self._in_a_row: dict[str, bool] = dict.fromkeys(self._root, True)

    def take(self, operation: Operation) -> None:
        """Note what an operation's outputs are."""
        looks = bool(operation.inputs) and not self.copies(operation)
        for output in operation.outputs:
            self._root[output.name] = self._root[operation.inputs[0].name] if looks else output
            self._in_a_row[output.name] = not looks or self._stays_in_a_row(operation, output)

    def copies(self, operation: Operation) -> bool:
        """Whether an operation makes an array of its own."""
        if operation.name in RESHAPES:
            return not self._in_a_row[operation.inputs[0].name]
        return operation.name not in VIEWS

    def _stays_in_a_row(self, operation: Operation, output: Array) -> bool:
        source = operation.inputs[0]
        if not self._in_a_row[source.name]:
            return False
        if operation.name == "Transpose":
            axes = [axis for axis in operation.arguments[0] if source.shape[axis] != 1]
            return axes == sorted(axes)
        if operation.name in ("Slice", "Split"):  # one row after the other, along the first axis
            lengths = [n for n, one in enumerate(source.shape) if one != 1]
            return not lengths or source.shape[lengths[0] + 1 :] == output.shape[lengths[0] + 1 :]
        return operation.name not in ("Broadcast", "BroadcastAxes") or source.size == output.size

    def bytes(self, array: Array) -> int:
        """Bytes that reading an array takes: a broadcast has no more than what it is made of."""
        return array.itemsize * min(array.size, self._root[array.name].size)


def _kernels_of(group: list[Operation], own: _Owners) -> list[Kernel]:
    first = group[0]
    if len(group) == 1 and not own.copies(first):
        return []
    launches = 2 if first.name in TWO_KERNELS else 1
    if first.name == "Concatenate":
        launches = len(first.inputs)
    name = "elementwise" if group[-1].name in ELEMENTWISE else first.name
    return [Kernel(name, _moved(group, own), sum(map(_flops, group)), launches)]


def _moved(group: list[Operation], own: _Owners) -> int:
    """Bytes that come from outside a group, and those of its results."""
    inside = {array.name for operation in group for array in operation.outputs}
    read = {array.name: array for one in group for array in one.inputs if array.name not in inside}
    first = group[0]
    if first.name.startswith("Gather"):  # of a table only the rows that are asked for
        read = {a.name: a for a in first.inputs[1:]} | {a.name: a for a in first.outputs}
    written = sum(
        array.size * array.itemsize
        for one in group
        for array in one.outputs
        if one is group[-1] or array.name in own.results
    )
    return written + sum(map(own.bytes, read.values()))


def _flops(operation: Operation) -> int:
    size = sum(array.size for array in operation.outputs)
    if operation.name in PRODUCTS:
        return 2 * size * operation.inputs[0].shape[-1]
    if operation.name == "Attention":  # q kᵀ, and its product with v
        return 4 * size * operation.inputs[1].shape[-2]
    if operation.name in FUSABLE - {"Broadcast"} or operation.name in MARKS.values():
        return size
    if operation.name in ("Reduce", "Softmax", "LogSumExp", "ArgReduce"):
        return operation.inputs[0].size
    return 0
