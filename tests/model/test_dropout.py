from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.model.dropout import dropout, split_key


def test_dropout_zeroes_values_and_keeps_the_mean() -> None:
    x = mx.ones((200, 200))
    assert dropout(x, 0.3, None) is x
    assert dropout(x, 0.0, mx.random.key(0)) is x
    y = np.array(dropout(x, 0.3, mx.random.key(0)))
    assert (y == 0).mean() == pytest.approx(0.3, abs=0.01)
    assert y.mean() == pytest.approx(1.0, abs=0.01)
    assert np.allclose(y[y > 0], 1 / 0.7)


def test_split_keys_are_independent_and_have_no_gradient() -> None:
    x, key = mx.ones((20, 20)), mx.random.key(3)
    masks = [np.array(dropout(x, 0.5, subkey)).tobytes() for subkey in (key, *split_key(key, 3))]
    assert len(set(masks)) == 4
    assert split_key(None, 3) == [None] * 3

    def dropout_sum(x: mx.array, key: mx.array) -> mx.array:
        return dropout(x, 0.5, split_key(key, 1)[0]).sum()

    gradient = mx.grad(dropout_sum, argnums=(0, 1))(x, key)[0]
    np.testing.assert_array_equal(gradient, dropout(x, 0.5, split_key(key, 1)[0]))
