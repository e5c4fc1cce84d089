"""Embedding lookup with a deterministic gradient on GPUs.

MLX's own gradient adds the rows of equal ids with atomics, in any order (`Gather::vjp`, Metal's
`scatter.h`, CUDA's `scatter_ops.cuh`). It is the only nondeterministic sum of a training step on a
GPU.
"""

from __future__ import annotations

import mlx.core as mx

MAX_ONE_HOT = 1024  # ids; up to here the one-hot product is cheap compared with the output head


@mx.custom_function
def embedding_lookup(weight: mx.array, ids: mx.array) -> mx.array:
    """Rows of `weight` [V, C] at `ids` [...]: [..., C]."""
    return weight[ids]


@embedding_lookup.vjp
def _lookup_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    weight, ids = primals
    rows = cotangent.reshape(-1, cotangent.shape[-1])
    return sum_by_id(rows, ids.reshape(-1), len(weight)), mx.zeros_like(ids)


def sum_by_id(rows: mx.array, ids: mx.array, count: int) -> mx.array:
    """Sum the `rows` [N, C] of each id: [count, C]. `ids` [N] are below `count`."""
    if count > MAX_ONE_HOT and mx.metal.is_available():
        return sum_by_segments(rows, ids, count)
    return sum_by_one_hot(rows, ids, count)  # some CUDA versions of MLX lack `segmented_mm`


def sum_by_one_hot(rows: mx.array, ids: mx.array, count: int) -> mx.array:
    """`sum_by_id` as products with one-hot matrices, MAX_ONE_HOT ids at a time."""
    chunks = [
        mx.arange(start, min(start + MAX_ONE_HOT, count)) for start in range(0, count, MAX_ONE_HOT)
    ]
    return mx.concatenate([(chunk[:, None] == ids).astype(rows.dtype) @ rows for chunk in chunks])


def sum_by_segments(rows: mx.array, ids: mx.array, count: int) -> mx.array:
    """`sum_by_id` as a segmented matrix product of the rows sorted by id."""
    counts = mx.zeros(count, mx.int32).at[ids].add(1)  # integers, so the order does not matter
    ends = mx.cumsum(counts)
    segments = mx.stack([ends - counts, ends], axis=1)
    ones = mx.ones((1, len(ids)), rows.dtype)
    return mx.segmented_mm(ones, rows[mx.argsort(ids)], segments)[:, 0]
