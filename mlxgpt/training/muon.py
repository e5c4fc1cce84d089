"""Muon (Jordan et al., 2024): momentum with all singular values brought near 1.

A few Newton-Schulz steps do that to the momentum of each matrix, so that rare directions are
learned as quickly as common ones. Then each row is divided by its own running size, and the whole
scaled back to the length it had (NorMuon, Li et al., 2025), so that no neuron moves more than the
others for long.

Unlike `mlx.optimizers.Muon` its weight decay is decoupled, and queries, keys and values, which are
one matrix in GPT-2, are orthogonalized as three. All matrices are updated together, so that a GPU
launches few kernels: their momentum is one flat array, and so are the sizes of their rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

Arrays = dict[str, mx.array]  # by dotted names

# The quintic of Jordan's Muon, steepest at 0: after five steps singular values are in 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-12
MOMENTUM = 0.95  # of the gradient's running mean, with Nesterov's look ahead; Jordan's
ROW_MOMENTUM = 0.95  # of the running mean square of a row


class Muon:
    """Updates of matrices[out, in], all with the same smaller dimension, as in a GPT; holds no
    state itself.

    Args:
        shapes: of the matrices, by dotted names.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        # Matrices that are treated alike are next to each other: (in how many parts, out, in).
        alike = {name: (_parts(name), *shape) for name, shape in shapes.items()}
        self._shapes = {name: shapes[name] for name in sorted(alike, key=lambda n: alike[n])}
        groups = itertools.groupby(sorted(alike.values()))
        self._stacks = [(len([*names]), *kind) for kind, names in groups]

    def init(self) -> Arrays:
        """The state before the first step: no momentum."""
        moments = self._moments().items()
        return {moment: mx.zeros(sum(map(math.prod, shapes))) for moment, shapes in moments}

    def update(
        self, gradients: Arrays, state: Arrays, scale: mx.array, good: mx.array
    ) -> tuple[Arrays, Arrays]:
        """By scale * gradients: what to subtract from each matrix, times the learning rate, and the
        next state. That is the old one if not `good`, except that -0.0 may become 0.0.
        """
        keep, add, keep_row, add_row = mx.where(
            good,
            mx.array([MOMENTUM, 1 - MOMENTUM, ROW_MOMENTUM, 1 - ROW_MOMENTUM]),
            mx.array([1.0, 0.0, 1.0, 0.0]),
        )
        gradient = mx.concatenate([gradients[name].reshape(-1) for name in self._shapes])
        gradient = mx.where(good, scale * gradient, 0.0)
        v = keep * state["v"] + add * gradient
        ahead = MOMENTUM * v + (1 - MOMENTUM) * gradient
        shapes = [(n * parts, rows // parts, cols) for n, parts, rows, cols in self._stacks]
        stacks = orthogonalized(ahead, shapes)

        # The mean square of each row; a matrix taller than wide has a step longer by √(out / in).
        of_rows = [(n, rows) for n, _, rows, _ in self._stacks]
        longer = [max(1.0, rows / cols) for _, rows, cols in shapes]
        weights = [
            np.full(math.prod(s), by / cols, np.float32)
            for s, by, (*_, cols) in zip(of_rows, longer, shapes, strict=True)
        ]
        sums = [mx.square(stack).sum(axis=2).reshape(-1) for stack in stacks]
        size = mx.array(np.concatenate(weights)) * mx.concatenate(sums)
        row = keep_row * state["rows"] + add_row * size
        even = mx.rsqrt(row + EPS)
        before, after, gain = (_split(x, of_rows) for x in (size, size * even * even, even))
        steps: list[mx.array] = []
        for n, stack in enumerate(stacks):
            # As long as before: by the sums of all squares, before and after.
            length = mx.sqrt(longer[n] * before[n].sum(axis=1) / (after[n].sum(axis=1) + EPS))
            matrices = stack.reshape(*of_rows[n], -1)
            steps += [
                x * (g[:, None] * by) for x, g, by in zip(matrices, gain[n], length, strict=True)
            ]
        return dict(zip(self._shapes, steps, strict=True)), {"v": v, "rows": row}

    def split(self, state: Arrays) -> Iterator[tuple[str, str, mx.array]]:
        """The state of each matrix separately: name, `v` or `rows`, array[out, in] or [out, 1]."""
        for moment, shapes in self._moments().items():
            pieces = _split(state[moment], shapes)
            yield from ((n, moment, one) for n, one in zip(self._shapes, pieces, strict=True))

    def joined(self, piece: Callable[[str, str], mx.array]) -> Arrays:
        """The state of what `split` gave, by a function of the name and the moment."""
        return {
            moment: mx.concatenate([piece(name, moment).reshape(-1) for name in self._shapes])
            for moment in self._moments()
        }

    def _moments(self) -> dict[str, list[tuple[int, ...]]]:
        shapes = [*self._shapes.values()]
        return {"v": shapes, "rows": [(rows, 1) for rows, _ in shapes]}


def orthogonalized(flat: mx.array, shapes: Sequence[tuple[int, ...]]) -> list[mx.array]:
    """Stacks[n, rows, columns] with all singular values of each matrix near 1.

    A Newton-Schulz step multiplies x with aI + bS + cS², where S = xxᵀ (of tall x: xᵀx, from the
    right). These polynomials commute with S, so the steps are taken on S alone, on those of all
    stacks at once, and x is multiplied once, with the product of all.

    Args:
        flat: the matrices, one after the other.
        shapes: of the stacks, all with the same smaller side.
    """
    a, b, c = QUINTIC
    squares = [square.sum(axis=(1, 2), keepdims=True) for square in _split(mx.square(flat), shapes)]
    stacks = [
        x / (mx.sqrt(square) + 1e-7)
        for x, square in zip(_split(flat, shapes), squares, strict=True)
    ]
    tall = [x.shape[1] > x.shape[2] for x in stacks]
    turned = [x.swapaxes(1, 2) for x in stacks]
    pairs = zip(stacks, turned, tall, strict=True)
    s = mx.concatenate([xt @ x if is_tall else x @ xt for x, xt, is_tall in pairs])
    y = mx.addmm(s, s, s, alpha=c, beta=b)  # bS + cS²
    product = a * mx.array(np.eye(s.shape[1], dtype=np.float32)) + y
    for _ in range(STEPS - 1):
        s = mx.addmm(s, s, y, beta=a)
        s = mx.addmm(s, s, y, beta=a)  # both sides of S
        y = mx.addmm(s, s, s, alpha=c, beta=b)
        product = mx.addmm(product, y, product, beta=a)
    products = _split(product, [(len(x), *s.shape[1:]) for x in stacks])
    pairs = zip(stacks, products, tall, strict=True)
    return [x @ p if is_tall else p @ x for x, p, is_tall in pairs]


def _parts(name: str) -> int:
    """In how many matrices, one above the other, a matrix is orthogonalized: q, k and v."""
    return 3 if name.endswith("c_attn.weight") else 1


def _split(flat: mx.array, shapes: Iterable[tuple[int, ...]]) -> list[mx.array]:
    """Arrays that are next to each other in one, along its first axis."""
    shapes = [*shapes]
    width = math.prod(flat.shape[1:])
    ends = itertools.accumulate(math.prod(shape) // width for shape in shapes)
    pieces = mx.split(flat, [*ends][:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
