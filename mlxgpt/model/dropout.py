"""Dropout with explicit random keys; without a key there is no dropout."""

from __future__ import annotations

import mlx.core as mx


def dropout(x: mx.array, rate: float, key: mx.array | None) -> mx.array:
    """Set a share `rate` of x to zero and scale up the rest; x itself without a key."""
    if key is None or rate == 0:
        return x
    return x * mx.random.bernoulli(1 - rate, x.shape, key=key) * (1 / (1 - rate))


def split_key(key: mx.array | None, count: int) -> list[mx.array] | list[None]:
    """Split a key into `count` independent ones; a list of None without a key. They have no
    gradient, although a checkpointed block is differentiated by all of its inputs.
    """
    if key is None:
        return [None] * count
    return list(mx.random.split(mx.stop_gradient(key), count))
