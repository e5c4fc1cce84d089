from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.backend import device, embedding, ops
from mlxgpt.backend.embedding import (
    MAX_ONE_HOT,
    embedding_lookup,
    sum_by_id,
    sum_by_one_hot,
    sum_by_segments,
)

SUM_FUNCTIONS = (sum_by_one_hot, sum_by_segments)
# Numbers of ids: one, a few, the most that one matmul handles, one more, and mostly unused ids.
COUNTS = (1, 19, MAX_ONE_HOT, MAX_ONE_HOT + 1, 3000)


def random_rows(count: int, integers: bool) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(count)
    rows = rng.integers(-9, 9, (300, 7)) if integers else rng.normal(size=(300, 7))
    return mx.array(rows.astype(np.float32)), mx.array(rng.integers(0, count, 300))


def sum_with_numpy(rows: mx.array, ids: mx.array, count: int) -> np.ndarray:
    sums = np.zeros((count, rows.shape[1]))
    np.add.at(sums, np.array(ids), np.array(rows).astype(np.float64))
    return sums


@pytest.mark.parametrize("way", SUM_FUNCTIONS)
@pytest.mark.parametrize("count", COUNTS)
def test_sum_by_id_matches_numpy(way: Callable[..., mx.array], count: int) -> None:
    """Exact for integers, otherwise up to the order of summation."""
    rows, ids = random_rows(count, integers=True)
    np.testing.assert_array_equal(way(rows, ids, count), sum_with_numpy(rows, ids, count))
    rows, ids = random_rows(count, integers=False)
    np.testing.assert_allclose(way(rows, ids, count), sum_with_numpy(rows, ids, count), atol=2e-5)


@pytest.mark.parametrize("way", SUM_FUNCTIONS)
@pytest.mark.parametrize("count", COUNTS)
def test_gradient_matches_the_cpu(
    way: Callable[..., mx.array], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum of n rows is within n roundings of its largest term; single rows are bit-exact."""
    monkeypatch.setattr(embedding, "sum_by_id", way)
    rows, ids = random_rows(count, integers=False)
    weight = mx.random.normal((count, 7), key=mx.random.key(0))

    def loss(lookup: Callable[..., Any]) -> Callable[[mx.array], mx.array]:
        return lambda weight: (lookup(weight, ids.reshape(3, 100)) * rows.reshape(3, 100, 7)).sum()

    actual = np.array(mx.compile(mx.grad(loss(embedding_lookup)))(weight))
    expected = np.array(mx.grad(loss(lambda weight, ids: weight[ids]))(weight))
    counts = np.bincount(np.array(ids), minlength=count)
    np.testing.assert_array_equal(actual[counts < 2], expected[counts < 2])
    bound = counts * sum_with_numpy(mx.abs(rows), ids, count).T * np.finfo(np.float32).eps
    assert (bound >= np.abs(actual - expected).T).all()
    np.testing.assert_array_equal(embedding_lookup(weight, ids), weight[ids])


@pytest.mark.parametrize(
    ("count", "metal", "way"),
    [
        (MAX_ONE_HOT, True, "sum_by_one_hot"),
        (MAX_ONE_HOT + 1, True, "sum_by_segments"),
        (MAX_ONE_HOT + 1, False, "sum_by_one_hot"),
    ],
)
def test_sum_method_depends_on_the_number_of_ids_and_the_backend(
    count: int, metal: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for function in SUM_FUNCTIONS:
        monkeypatch.setattr(
            embedding,
            function.__name__,
            lambda *_, function=function: calls.append(function.__name__),
        )
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    sum_by_id(*random_rows(count, integers=True), count)
    assert calls == [way]


def test_bfloat16_sums_are_rounded_once() -> None:
    rows, ids = random_rows(19, integers=False)
    rows = rows.astype(mx.bfloat16)
    for way in SUM_FUNCTIONS:
        actual = way(rows, ids, 19)
        assert actual.dtype == mx.bfloat16
        expected = sum_with_numpy(rows.astype(mx.float32), ids, 19)
        np.testing.assert_allclose(actual.astype(mx.float32), expected, rtol=2**-7, atol=2**-7)


def test_embedding_lookup_is_not_used_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(ops, "embedding_lookup", lambda weight, ids: calls.append(True))
    for cpu in (True, False):
        monkeypatch.setattr(device, "on_cpu", lambda cpu=cpu: cpu)
        ops.embedding(mx.zeros((3, 2)), mx.array([1]))
    assert calls == [True]
