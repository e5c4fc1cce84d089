"""Each formula of the CPU against its exact twin: MLX's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.machine.device import on_cpu
from mlxgpt.model import kernels

pytestmark = pytest.mark.skipif(not on_cpu(), reason="the formulas of the CPU")


def exact_softmax(scores: mx.array) -> mx.array:
    allowed = mx.tril(mx.ones(scores.shape[-2:])) > 0
    return mx.softmax(mx.where(allowed, scores, float("-inf")), axis=-1)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50))
def test_gelu_is_the_tanh_form_everywhere(values: list[float]) -> None:
    x = mx.array(values)
    exact = nn.gelu_approx(x)
    np.testing.assert_allclose(kernels.gelu(x), exact, rtol=1e-5, atol=2e-6)


def test_gelu_is_the_exact_formula_in_double_precision() -> None:
    x = np.linspace(-12, 12, 4801)
    exact = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(kernels.gelu(mx.array(x.astype(np.float32))), exact, atol=1e-6)


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=50))
def test_gelus_gradient(values: list[float]) -> None:
    x = mx.array(values)
    weights = mx.cos(mx.arange(len(values)) + 1.0)
    ours, exact = (
        mx.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (kernels.gelu, nn.gelu_approx)
    )
    np.testing.assert_allclose(ours, exact, atol=1e-5)


@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=50))
def test_silu_and_its_gradient(values: list[float]) -> None:
    x = mx.array(values)
    np.testing.assert_allclose(kernels.silu(x), nn.silu(x), rtol=1e-5, atol=2e-6)
    weights = mx.cos(mx.arange(len(values)) + 1.0)
    ours, exact = (
        mx.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (kernels.silu, nn.silu)
    )
    np.testing.assert_allclose(ours, exact, atol=1e-5)


@pytest.mark.parametrize("spread", [0.1, 3.0, 300.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_cross_entropy_and_its_gradient(spread: float, compiled: bool) -> None:
    logits = spread * mx.random.normal((2, 5, 70), key=mx.random.key(0))
    targets = mx.random.randint(0, 70, (2, 5), key=mx.random.key(1))
    weights = mx.random.normal((2, 5), key=mx.random.key(2))

    def both(loss: Callable) -> tuple[mx.array, mx.array]:
        def weighed(logits: mx.array) -> tuple[mx.array, mx.array]:
            losses = loss(logits, targets)
            return (losses * weights).sum(), losses

        run = mx.value_and_grad(weighed)
        (_, losses), gradient = (mx.compile(run) if compiled else run)(logits)
        return losses, gradient

    ours, exact = both(kernels.cross_entropy), both(nn.losses.cross_entropy)
    np.testing.assert_allclose(ours[0], exact[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[1], exact[1], atol=1e-6)


def test_cross_entropy_where_one_logit_is_all_and_where_all_are_equal() -> None:
    certain = mx.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
    losses = kernels.cross_entropy(certain, mx.array([0, 2]))
    np.testing.assert_allclose(losses, [0.0, math.log(3)], atol=1e-6)
    assert kernels.cross_entropy(certain, mx.array([2, 0]))[0].item() == pytest.approx(2e4)
    lost = kernels.cross_entropy(mx.array([math.nan, 0.0]), mx.array(0))
    assert math.isnan(float(lost))


@pytest.mark.parametrize("spread", [0.1, 3.0, 300.0])
def test_causal_softmax_and_its_gradient(spread: float) -> None:
    scores = spread * mx.random.normal((2, 3, 17, 17), key=mx.random.key(0))
    weights = mx.random.normal(scores.shape, key=mx.random.key(1))
    found = np.array(kernels.causal_softmax(scores))
    np.testing.assert_allclose(found, exact_softmax(scores), atol=1e-6)
    ours, exact = (
        mx.grad(lambda s, f=f: (f(s) * weights).sum())(scores)
        for f in (kernels.causal_softmax, exact_softmax)
    )
    np.testing.assert_allclose(ours, exact, atol=1e-5)


def test_what_is_masked_is_exactly_zero() -> None:
    probs = np.array(kernels.causal_softmax(mx.random.normal((9, 9), key=mx.random.key(0))))
    assert (probs[np.triu_indices(9, 1)] == 0).all()
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_is_mlxs_own(compiled: bool) -> None:
    q, k, v = mx.random.normal((3, 2, 4, 16, 8), key=mx.random.key(0))
    exact = mx.fast.scaled_dot_product_attention(q, k, v, scale=8**-0.5, mask="causal")
    attention = mx.compile(kernels.causal_attention) if compiled else kernels.causal_attention
    np.testing.assert_allclose(attention(q, k, v), exact, atol=2e-6)


def test_sixteen_bits_take_mlxs_own() -> None:
    x = mx.random.normal((8,), key=mx.random.key(0)).astype(mx.bfloat16)
    assert kernels.gelu(x).dtype == mx.bfloat16
    q = mx.random.normal((1, 1, 4, 8), key=mx.random.key(0)).astype(mx.bfloat16)
    assert kernels.causal_attention(q, q, q).dtype == mx.bfloat16
