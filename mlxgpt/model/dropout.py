"""Dropout with explicit random keys; without a key, dropout is off."""

from __future__ import annotations

import mlx.core as mx


def dropout(x: mx.array, rate: float, key: mx.array | None) -> mx.array:
    """Set a fraction `rate` of x to zero and scale up the rest; return x itself without a key."""
    if key is None or rate == 0:
        return x
    return x * mx.random.bernoulli(1 - rate, x.shape, key=key) * (1 / (1 - rate))


def split_key(key: mx.array | None, count: int) -> list[mx.array] | list[None]:
    """Split a key into `count` keys; a list of None without a key. Gradients stop at the keys,
    since a checkpointed block is differentiated with respect to all of its inputs.
    """
    if key is None:
        return [None] * count
    return list(mx.random.split(mx.stop_gradient(key), count))
