"""Dropout, drawn with keys: none without one. A part of a batch has the mask that it would have as
part of the whole, whoever computes it.
"""

from __future__ import annotations

import mlx.core as mx

# A key; or, where x is a part of a batch, the key of the whole one, x's first row in it, int32 [1],
# and how many rows that has.
Key = mx.array | tuple[mx.array, mx.array, int]


def dropout(x: mx.array, rate: float, key: Key | None) -> mx.array:
    """Zero a share `rate` of x and scale up the rest; x itself without a key."""
    if key is None or rate == 0:
        return x
    return x * _kept(x.shape, 1 - rate, key) * (1 / (1 - rate))


def _kept(shape: tuple[int, ...], share: float, key: Key) -> mx.array:
    if isinstance(key, mx.array):
        return mx.random.bernoulli(share, shape, key=key)
    of_all, first, rows = key
    drawn = mx.random.bernoulli(share, (rows, *shape[1:]), key=of_all)
    return mx.slice(drawn, first, (0,), shape)


def split(key: Key, count: int) -> list[Key]:
    """A key for each of so many purposes. A checkpointed block is differentiated by all its inputs,
    and a key has no gradient.
    """
    if isinstance(key, mx.array):
        return list(mx.random.split(mx.stop_gradient(key), count))
    of_all, first, rows = key
    first = mx.stop_gradient(first)
    return [(one, first, rows) for one in mx.random.split(mx.stop_gradient(of_all), count)]
