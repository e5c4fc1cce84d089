"""Fast products of a few vectors and a weight, for decoding: column-major or split weights."""

from __future__ import annotations

import mlx.core as mx

SMALL_WEIGHT_SIZE = 100_000  # values; smaller weights may be column-major and are never split
MAX_PART = 400_000  # multiplications; for larger products, OpenBLAS first copies the weight


def cpu_to_column_major(weight: mx.array) -> mx.array:
    """Copy `weight` [O, I] to column-major order if it is small: its product with a few vectors
    then takes as little as half the time. No gradient.
    """
    return weight if weight.size >= SMALL_WEIGHT_SIZE else mx.contiguous(weight.T).T


MAX_VECTORS = 8  # per split product; twice that for a large weight
LARGE_WEIGHT_SIZE = 8_000_000  # values; such weights do not fit into the CPU's caches


def is_split_faster(x: mx.array, weight: mx.array) -> bool:
    """Whether `split_matmul` is faster than one product of x [..., I] and `weight` [O, I]."""
    vectors = x.size // x.shape[-1]
    max_vectors = 2 * MAX_VECTORS if weight.size > LARGE_WEIGHT_SIZE else MAX_VECTORS
    return (
        vectors <= max_vectors
        and vectors * weight.size > MAX_PART
        and weight.size >= SMALL_WEIGHT_SIZE
    )


MIN_PART_ROWS = 16  # rows of the weight in each part


def split_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """Product of x [..., I] and the transposed `weight` [O, I], split along its rows: [..., O]."""
    rows, length = weight.shape
    min_parts = -(-weight.size * (x.size // length) // MAX_PART)
    parts = next((n for n in range(min_parts, rows + 1) if rows % n == 0), rows)
    if rows // parts < MIN_PART_ROWS:
        return x @ weight.T
    y = x.reshape(-1, length) @ weight.reshape(parts, rows // parts, length).swapaxes(1, 2)
    return y.swapaxes(0, 1).reshape(*x.shape[:-1], rows)
