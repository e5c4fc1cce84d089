from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.model.dropout import dropout, split


def test_dropout_needs_a_key_keeps_the_mean_and_zeroes_its_share() -> None:
    x = mx.ones((200, 200))
    assert dropout(x, 0.3, None) is x
    assert dropout(x, 0.0, mx.random.key(0)) is x
    y = np.array(dropout(x, 0.3, mx.random.key(0)))
    assert (y == 0).mean() == pytest.approx(0.3, abs=0.01)
    assert y.mean() == pytest.approx(1.0, abs=0.01)
    assert np.allclose(y[y > 0], 1 / 0.7)


def test_a_part_has_the_mask_that_it_has_in_the_whole() -> None:
    x, key = mx.ones((6, 5, 4)), mx.random.key(3)
    of_part = key, mx.array([2]), 6
    whole = [dropout(x, 0.5, one) for one in (key, *split(key, 2))]
    parts = [dropout(x[2:4], 0.5, one) for one in (of_part, *split(of_part, 2))]
    for all_rows, rows in zip(whole, parts, strict=True):
        assert (rows == all_rows[2:4]).all()
        assert not (rows == all_rows[:2]).all()
