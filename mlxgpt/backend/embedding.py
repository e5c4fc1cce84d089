"""Embedding lookup for GPUs, with a gradient that has the same bits each time.

MLX's own adds the rows of equal ids with atomics (`Gather::vjp`, Metal's `scatter.h`, CUDA's
`scatter_ops.cuh`), in any order: the one sum of a training step whose bits vary on a GPU.
"""

from __future__ import annotations

import mlx.core as mx

ONE_HOT = 1024  # ids; a product with a one-hot matrix of this width costs little next to the head


@mx.custom_function
def lookup(weight: mx.array, ids: mx.array) -> mx.array:
    """Rows of weight[V, C] at ids[...]: [..., C]."""
    return weight[ids]


@lookup.vjp
def _lookup_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    weight, ids = primals
    rows = cotangent.reshape(-1, cotangent.shape[-1])
    return sum_by_id(rows, ids.reshape(-1), len(weight)), mx.zeros_like(ids)


def sum_by_id(rows: mx.array, ids: mx.array, count: int) -> mx.array:
    """Of rows[N, C] the sum for each id: [count, C]; ids[N] are below `count`."""
    if count > ONE_HOT and mx.metal.is_available():
        return sum_of_segments(rows, ids, count)
    return sum_by_one_hot(rows, ids, count)  # CUDA has no segmented product in some versions


def sum_by_one_hot(rows: mx.array, ids: mx.array, count: int) -> mx.array:
    """`sum_by_id` as products with one-hot matrices, for ONE_HOT ids at a time."""
    parts = [mx.arange(n, min(n + ONE_HOT, count)) for n in range(0, count, ONE_HOT)]
    return mx.concatenate([(part[:, None] == ids).astype(rows.dtype) @ rows for part in parts])


def sum_of_segments(rows: mx.array, ids: mx.array, count: int) -> mx.array:
    """`sum_by_id` as a segmented product of the rows in the order of their ids."""
    counts = mx.zeros(count, mx.int32).at[ids].add(1)  # of whole numbers, in any order
    ends = mx.cumsum(counts)
    segments = mx.stack([ends - counts, ends], axis=1)
    ones = mx.ones((1, len(ids)), rows.dtype)
    return mx.segmented_mm(ones, rows[mx.argsort(ids)], segments)[:, 0]
