from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.backend import device, ops
from mlxgpt.backend.cpu import kernels, weights
from mlxgpt.backend.device import on_cpu

pytestmark = pytest.mark.skipif(not on_cpu(), reason="for the CPU")


@pytest.mark.parametrize("rows", [4, 96, 97, 29 * 31])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1, 6), (3, 6), (2, 4, 6)])
def test_a_split_product_is_the_whole_one(
    rows: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MIN_SIZE", 0)
    monkeypatch.setattr(weights, "SMALL_WEIGHT_SIZE", 0)
    x = mx.random.normal(shape, key=mx.random.key(0))
    weight, bias = mx.random.normal((rows, 6), key=mx.random.key(1)), mx.arange(float(rows))
    for part in (120, 900, 400_000):
        monkeypatch.setattr(weights, "MAX_PART", part)
        y = ops.linear(x, weight, bias)
        assert y.shape == (*shape[:-1], rows)
        np.testing.assert_allclose(y, x @ weight.T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("vectors", "shape", "split"),
    [
        (1, (1000, 100), False),  # one part
        (5, (1000, 100), True),
        (5, (999, 100), False),  # such a weight may be laid out by columns
        (8, (1000, 400), True),
        (9, (1000, 400), False),
        (16, (8001, 1000), True),  # no cache holds it
        (17, (8001, 1000), False),
        (0, (1000, 400), False),
    ],
)
def test_a_product_of_a_few_vectors_with_a_larger_weight_is_split(
    vectors: int, shape: tuple[int, int], split: bool
) -> None:
    x = mx.zeros((vectors, shape[1]))
    assert weights.is_split_faster(x, mx.zeros(shape)) == split


@pytest.mark.parametrize("rows", [1, 5])
def test_a_weight_by_columns_has_the_same_values(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = mx.random.normal((7, 3)), mx.random.normal((rows, 3))
    columns = ops.to_column_major(weight)
    assert np.asarray(columns).strides == (4, 4 * 7)
    assert mx.array_equal(columns, weight)
    np.testing.assert_allclose(ops.linear(x, columns), x @ weight.T, atol=1e-6)
    large = mx.zeros((weights.SMALL_WEIGHT_SIZE, 1))
    assert ops.to_column_major(large) is large, "it is split by rows"
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    assert ops.to_column_major(weight) is weight
