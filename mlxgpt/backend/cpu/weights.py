"""Matrix products of a few vectors with a weight, as in decoding: column-major, or in parts."""

from __future__ import annotations

import mlx.core as mx

SMALL_WEIGHT_SIZE = 100_000  # values; with fewer, a weight may be column-major, and is never split
MAX_PART = 400_000  # multiplications; in larger products OpenBLAS first copies the weight


def cpu_to_column_major(weight: mx.array) -> mx.array:
    """The same `weight` [O, I] with one column after another in memory, if it is small: a product
    of a few vectors with it takes as little as half the time. It has no gradient.
    """
    return weight if weight.size >= SMALL_WEIGHT_SIZE else mx.contiguous(weight.T).T


MAX_VECTORS = 8  # that are multiplied in parts; twice as many with a large weight
LARGE_WEIGHT_SIZE = 8_000_000  # values, which no cache holds


def is_split_faster(x: mx.array, weight: mx.array) -> bool:
    """Whether `split_matmul` is faster than one product of x [..., I] and `weight` [O, I]."""
    vectors = x.size // x.shape[-1]
    max_vectors = 2 * MAX_VECTORS if weight.size > LARGE_WEIGHT_SIZE else MAX_VECTORS
    return (
        vectors <= max_vectors
        and vectors * weight.size > MAX_PART
        and weight.size >= SMALL_WEIGHT_SIZE
    )


MIN_PART_ROWS = 16  # rows of the weight


def split_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """Product of x [..., I] and the transposed `weight` [O, I], some of its rows at a time:
    [..., O].
    """
    rows, length = weight.shape
    min_parts = -(-weight.size * (x.size // length) // MAX_PART)
    parts = next((n for n in range(min_parts, rows + 1) if rows % n == 0), rows)
    if rows // parts < MIN_PART_ROWS:
        return x @ weight.T
    y = x.reshape(-1, length) @ weight.reshape(parts, rows // parts, length).swapaxes(1, 2)
    return y.swapaxes(0, 1).reshape(*x.shape[:-1], rows)
