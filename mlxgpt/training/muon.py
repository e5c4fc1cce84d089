"""Muon optimizer (Jordan et al., 2024) with row normalization (NorMuon, Li et al., 2025).

A few Newton-Schulz steps bring all singular values of each matrix's momentum near 1, so that rare
directions are learned as quickly as common ones. Then each row is divided by its running RMS, and
the matrix is rescaled to its previous norm, so that no neuron moves more than the others for long.

Unlike in `mlx.optimizers.Muon`, weight decay is decoupled, and queries, keys and values, one matrix
in GPT-2, are orthogonalized as three. All matrices are updated together, so that a GPU launches few
kernels: their momentum is one flat array, and so are the mean squares of their rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlxgpt.distributed.group import Arrays

MUON_EPS = 1e-12
MOMENTUM = 0.95  # decay of the gradient's running mean, with Nesterov; Jordan's value
ROW_MOMENTUM = 0.95  # decay of the running mean square of each row


class Muon:
    """Computes Muon updates of matrices[out, in] with the same smaller dimension, as in a GPT.
    Stateless.

    Args:
        shapes: shapes of the matrices, by dotted name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        # Matrices of the same kind (parts, out, in) are next to each other, to be stacked.
        kinds = {name: (_count_parts(name), *shape) for name, shape in shapes.items()}
        self._shapes = {name: shapes[name] for name in sorted(kinds, key=lambda n: kinds[n])}
        groups = itertools.groupby(sorted(kinds.values()))
        self._stack_shapes = [(len([*names]), *kind) for kind, names in groups]

    def init(self) -> Arrays:
        """The state before the first step, all zeros."""
        moments = self._moment_shapes().items()
        return {moment: mx.zeros(sum(map(math.prod, shapes))) for moment, shapes in moments}

    def update(
        self, gradients: Arrays, state: Arrays, scale: mx.array, should_apply: mx.array
    ) -> tuple[Arrays, Arrays]:
        """Update with scale * gradients. Returns what to subtract from each matrix, before the
        learning rate, and the next state, which is unchanged if not `should_apply`, except that
        -0.0 may become 0.0.
        """
        keep, add, keep_row, add_row = mx.where(
            should_apply,
            mx.array([MOMENTUM, 1 - MOMENTUM, ROW_MOMENTUM, 1 - ROW_MOMENTUM]),
            mx.array([1.0, 0.0, 1.0, 0.0]),
        )
        gradient = mx.concatenate([gradients[name].reshape(-1) for name in self._shapes])
        gradient = mx.where(should_apply, scale * gradient, 0.0)
        v = keep * state["v"] + add * gradient
        nesterov = MOMENTUM * v + (1 - MOMENTUM) * gradient
        shapes = [(n * parts, rows // parts, cols) for n, parts, rows, cols in self._stack_shapes]
        stacks = orthogonalize(nesterov, shapes)

        # Mean square of each row. The step of a tall matrix is larger by √(out / in).
        row_shapes = [(n, rows) for n, _, rows, _ in self._stack_shapes]
        aspect_ratios = [max(1.0, rows / cols) for _, rows, cols in shapes]
        row_weights = [
            np.full(math.prod(shape), ratio / cols, np.float32)
            for shape, ratio, (*_, cols) in zip(row_shapes, aspect_ratios, shapes, strict=True)
        ]
        sums = [mx.square(stack).sum(axis=2).reshape(-1) for stack in stacks]
        row_mean_squares = mx.array(np.concatenate(row_weights)) * mx.concatenate(sums)
        second_moment = keep_row * state["rows"] + add_row * row_mean_squares
        inverse_rms = mx.rsqrt(second_moment + MUON_EPS)
        squares_before, squares_after, row_scales = (
            _split(x, row_shapes)
            for x in (row_mean_squares, row_mean_squares * inverse_rms * inverse_rms, inverse_rms)
        )
        updates: list[mx.array] = []
        for n, stack in enumerate(stacks):
            # Restore the norm from before the row scaling.
            norm_ratios = mx.sqrt(
                aspect_ratios[n]
                * squares_before[n].sum(axis=1)
                / (squares_after[n].sum(axis=1) + MUON_EPS)
            )
            matrices = stack.reshape(*row_shapes[n], -1)
            updates += [
                x * (scales[:, None] * ratio)
                for x, scales, ratio in zip(matrices, row_scales[n], norm_ratios, strict=True)
            ]
        return dict(zip(self._shapes, updates, strict=True)), {"v": v, "rows": second_moment}

    def split(self, state: Arrays) -> Iterator[tuple[str, str, mx.array]]:
        """Yield the state of each matrix: name, `v` or `rows`, array[out, in] or [out, 1]."""
        for moment, shapes in self._moment_shapes().items():
            pieces = _split(state[moment], shapes)
            yield from ((n, moment, array) for n, array in zip(self._shapes, pieces, strict=True))

    def join(self, get_array: Callable[[str, str], mx.array]) -> Arrays:
        """Inverse of `split`: the state, from a function (name, moment) -> array."""
        return {
            moment: mx.concatenate([get_array(name, moment).reshape(-1) for name in self._shapes])
            for moment in self._moment_shapes()
        }

    def _moment_shapes(self) -> dict[str, list[tuple[int, ...]]]:
        shapes = [*self._shapes.values()]
        return {"v": shapes, "rows": [(rows, 1) for rows, _ in shapes]}


# Jordan's, steepest at 0: after five steps, singular values are between 0.7 and 1.2.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
NORM_EPS = 1e-7  # avoids division by zero; Jordan's value


def orthogonalize(flat: mx.array, shapes: Sequence[tuple[int, ...]]) -> list[mx.array]:
    """Orthogonalize matrices by Newton-Schulz steps, which bring all singular values near 1.

    A step multiplies x by aI + bS + cS², where S = xxᵀ (for tall x: xᵀx, from the right). These
    polynomials commute with S, so the steps run on S alone, for all stacks together, and x is
    multiplied once, by the product of all steps.

    Args:
        flat: the matrices, concatenated.
        shapes: shapes [n, rows, columns] of the stacks, all with the same smaller side.

    Returns:
        Stacks[n, rows, columns] of orthogonalized matrices.
    """
    a, b, c = NS_COEFFICIENTS
    squares = [square.sum(axis=(1, 2), keepdims=True) for square in _split(mx.square(flat), shapes)]
    stacks = [
        x / (mx.sqrt(square) + NORM_EPS)
        for x, square in zip(_split(flat, shapes), squares, strict=True)
    ]
    tall = [x.shape[1] > x.shape[2] for x in stacks]
    transposed = [x.swapaxes(1, 2) for x in stacks]
    triples = zip(stacks, transposed, tall, strict=True)
    s = mx.concatenate([xt @ x if is_tall else x @ xt for x, xt, is_tall in triples])
    y = mx.addmm(s, s, s, alpha=c, beta=b)  # bS + cS²
    product = a * mx.array(np.eye(s.shape[1], dtype=np.float32)) + y
    for _ in range(NS_STEPS - 1):
        s = mx.addmm(s, s, y, beta=a)
        s = mx.addmm(s, s, y, beta=a)  # from both sides of S
        y = mx.addmm(s, s, s, alpha=c, beta=b)
        product = mx.addmm(product, y, product, beta=a)
    products = _split(product, [(len(x), *s.shape[1:]) for x in stacks])
    triples = zip(stacks, products, tall, strict=True)
    return [x @ p if is_tall else p @ x for x, p, is_tall in triples]


def _count_parts(name: str) -> int:
    """Number of row blocks that are orthogonalized separately: 3 for q, k and v."""
    return 3 if name.endswith("c_attn.weight") else 1


def _split(flat: mx.array, shapes: Iterable[tuple[int, ...]]) -> list[mx.array]:
    """Split an array along its first axis into arrays of these shapes."""
    shapes = [*shapes]
    width = math.prod(flat.shape[1:])
    ends = itertools.accumulate(math.prod(shape) // width for shape in shapes)
    pieces = mx.split(flat, [*ends][:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
