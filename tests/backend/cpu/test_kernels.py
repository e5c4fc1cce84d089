"""Each formula of the CPU against MLX's own operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlxgpt.backend import ops
from mlxgpt.backend.cpu import kernels
from mlxgpt.backend.device import on_cpu

pytestmark = pytest.mark.skipif(not on_cpu(), reason="the formulas of the CPU")


@pytest.fixture(scope="module", autouse=True)
def any_size() -> Iterator[None]:
    """Our formulas also for a few values, where MLX's own are faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MIN_SIZE", 0)
        yield


def value_and_gradients(
    function: Callable, compiled: bool, weights: mx.array, *inputs: mx.array
) -> list[np.ndarray]:
    """What a function gives, and the gradients of its weighted sum by each input."""

    def weighted_sum(*inputs: mx.array) -> tuple[mx.array, mx.array]:
        output = function(*inputs)
        return (output * weights).sum(), output

    run = mx.value_and_grad(weighted_sum, argnums=tuple(range(len(inputs))))
    (_, y), gradients = (mx.compile(run) if compiled else run)(*inputs)
    return [np.array(x) for x in (y, *gradients)]


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50))
def test_gelu_is_the_tanh_form_everywhere(values: list[float]) -> None:
    x = mx.array(values)
    exact = nn.gelu_approx(x)
    np.testing.assert_allclose(ops.gelu(x), exact, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(ops.gelu(x, gradient=False), exact, rtol=1e-5, atol=2e-6)


def test_gelu_is_the_exact_formula_in_double_precision() -> None:
    x = np.linspace(-12, 12, 4801)
    exact = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(ops.gelu(mx.array(x.astype(np.float32))), exact, atol=1e-6)


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=50))
def test_gelus_gradient(values: list[float]) -> None:
    x = mx.array(values)
    weights = mx.cos(mx.arange(len(values)) + 1.0)
    actual, exact = (
        mx.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (ops.gelu, nn.gelu_approx)
    )
    np.testing.assert_allclose(actual, exact, atol=1e-5)


@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=50))
def test_silu_and_its_gradient(values: list[float]) -> None:
    x = mx.array(values)
    np.testing.assert_allclose(ops.silu(x), nn.silu(x), rtol=1e-5, atol=2e-6)
    weights = mx.cos(mx.arange(len(values)) + 1.0)
    actual, exact = (mx.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (ops.silu, nn.silu))
    np.testing.assert_allclose(actual, exact, atol=1e-5)


@pytest.mark.parametrize("spread", [0.1, 3.0, 300.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_cross_entropy_and_its_gradient(spread: float, compiled: bool) -> None:
    logits = spread * mx.random.normal((2, 5, 70), key=mx.random.key(0))
    targets = mx.random.randint(0, 70, (2, 5), key=mx.random.key(1))
    weights = mx.random.normal((2, 5), key=mx.random.key(2))

    actual, exact = (
        value_and_gradients(lambda x, f=f: f(x, targets), compiled, weights, logits)
        for f in (ops.cross_entropy, nn.losses.cross_entropy)
    )
    np.testing.assert_allclose(actual[0], exact[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual[1], exact[1], atol=1e-6)


def test_cross_entropy_where_one_logit_is_all_and_where_all_are_equal() -> None:
    logits = mx.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
    losses = ops.cross_entropy(logits, mx.array([0, 2]))
    np.testing.assert_allclose(losses, [0.0, math.log(3)], atol=1e-6)
    assert ops.cross_entropy(logits, mx.array([2, 0]))[0].item() == pytest.approx(2e4)
    loss = ops.cross_entropy(mx.array([math.nan, 0.0]), mx.array(0))
    assert math.isnan(float(loss))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_linear_layer_and_its_gradients(compiled: bool) -> None:
    x = mx.random.normal((2, 5, 6), key=mx.random.key(0))
    weight, bias = mx.random.normal((4, 6), key=mx.random.key(1)), mx.arange(4.0)
    weights = mx.random.normal((2, 5, 4), key=mx.random.key(2))

    def exact(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        return x @ weight.T + bias

    results = (
        value_and_gradients(f, compiled, weights, x, weight, bias) for f in (ops.linear, exact)
    )
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_allclose(ops.linear(x, weight), x @ weight.T, atol=1e-5)


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=20),
        elements=st.floats(-1e4, 1e4, width=32) | st.just(-math.inf),
    )
)
def test_softmax(x: np.ndarray) -> None:
    x[..., 0] = np.maximum(x[..., 0], -1e4)  # one at least can be drawn
    exact = mx.softmax(mx.array(x), axis=-1)
    np.testing.assert_allclose(ops.softmax(mx.array(x)), exact, rtol=1e-5, atol=1e-7)


def exact_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_and_its_gradient(spread: float, compiled: bool) -> None:
    q, k, v, weights = mx.random.normal((4, 2, 3, 17, 8), key=mx.random.key(0))
    q = spread * q

    results = (
        value_and_gradients(f, compiled, weights, q, k, v)
        for f in (ops.causal_attention, exact_attention)
    )
    for actual, exact in zip(*results, strict=True):
        np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-5 * max(1, spread))


def test_what_is_yet_to_come_changes_nothing() -> None:
    """However loud it is: not one bit."""
    q, k, v = mx.random.normal((3, 1, 2, 9, 4), key=mx.random.key(0))
    is_future = mx.arange(9)[:, None] >= 5
    perturbed = ops.causal_attention(
        q, mx.where(is_future, 1e4 * k, k), mx.where(is_future, 1e8, v)
    )
    expected = ops.causal_attention(q, k, v)
    np.testing.assert_array_equal(perturbed[:, :, :5], expected[:, :, :5])


def test_a_weight_too_small_for_a_number_is_zero() -> None:
    """And not the smallest normal one, whose products would be denormal, and slow."""
    k = mx.array([[[[1.0], [0.0]]]])
    actual: Any = kernels._attention_with_weights(200 * k, k, k)
    assert actual[1][0, 0].tolist() == [[1.0, 1.0], [0.0, 1.0]]


def exact_rms_norm(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, weight, ops.NORM_EPS)


def exact_layer_norm(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.fast.layer_norm(x, weight, bias, ops.NORM_EPS)


@pytest.mark.parametrize(("offset", "size"), [(0.0, 1.0), (5.0, 1.0), (0.0, 1e-3), (0.0, 0.0)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("norm", "exact"),
    [
        (ops.layer_norm, exact_layer_norm),
        (lambda x, weight, bias: ops.rms_norm(x, weight), exact_rms_norm),
    ],
)
def test_norms_and_their_gradients(
    norm: Callable, exact: Callable, compiled: bool, offset: float, size: float
) -> None:
    x = offset + size * mx.random.normal((2, 5, 24), key=mx.random.key(0))
    weight, bias = mx.random.normal((2, 24), key=mx.random.key(1))
    weights = mx.random.normal(x.shape, key=mx.random.key(2))

    results = (
        value_and_gradients(lambda x, w, f=f: f(x, w, bias), compiled, weights, x, weight)
        for f in (norm, exact)
    )
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_norms_without_gain_and_bias() -> None:
    x = mx.random.normal((3, 24), key=mx.random.key(0))
    np.testing.assert_allclose(
        ops.layer_norm(x, None, None),
        mx.fast.layer_norm(x, None, None, ops.NORM_EPS),
        atol=1e-5,
    )
    np.testing.assert_allclose(ops.rms_norm(x), mx.fast.rms_norm(x, None, ops.NORM_EPS), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_attention_of_the_last_token(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    q_key, k_key, v_key = mx.random.split(mx.random.key(0), 3)
    q = mx.random.normal((4, 2, 1, 8), key=q_key)
    k, v = (mx.random.normal((4, 2, 5, 8), key=key) for key in (k_key, v_key))
    mask = (mx.arange(5) < mx.array([[3], [1], [5], [2]])[:rows])[:, None, None]
    actual = ops.decode_attention(q, k, v, mask)
    monkeypatch.setattr(kernels, "MIN_SIZE", 1 << 60)
    np.testing.assert_allclose(actual, ops.decode_attention(q, k, v, mask), atol=1e-6)
