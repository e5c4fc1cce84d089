"""The formulas that differ by backend: GELU, SiLU, causal attention and cross-entropy.

On a GPU these are MLX's own kernels. On the CPU, MLX computes tanh and exp one number at a time,
and a GELU or softmax then costs more than the matrix products around it; here they are built from
operations that a C++ compiler vectorises. Each has an exact twin to be tested against.

What helps a compiled CPU kernel, found by measuring: no `maximum` and no `floor` (scalar calls),
no broadcast operand inside it (its loop is then strided and scalar). `mx.contiguous` costs nothing
on an array that is contiguous, and the compiler does not fuse across it.
"""

from __future__ import annotations

import math
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlxgpt.machine.device import on_cpu

GELU_SCALE = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715
# 2^f on [-1/2, 1/2]: the coefficients of its polynomial, highest power first.
EXP2 = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
ROUND = 12582912.0  # 1.5 · 2^23: adding it rounds to a whole number, kept in the low bits
LARGE = 1e9

_fence = mx.contiguous


def gelu(x: mx.array) -> mx.array:
    """GELU in its tanh form (Hendrycks & Gimpel, 2016), as GPT-2 has it; any shape."""
    if on_cpu() and x.dtype == mx.float32:
        return cast(tuple[mx.array, mx.array], _gelu_with_gate(x))[0]
    return nn.gelu_approx(x)


def silu(x: mx.array) -> mx.array:
    """X · sigmoid(x); any shape."""
    if on_cpu() and x.dtype == mx.float32:
        return cast(tuple[mx.array, mx.array], _silu_with_gate(x))[0]
    return nn.silu(x)


def causal_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """softmax(q kᵀ / √D) v, each position seeing itself and those before it.

    Args:
        q, k, v: [B, H, T, D].

    Returns:
        [B, H, T, D]
    """
    scale = 1 / math.sqrt(q.shape[-1])
    if on_cpu() and q.dtype == mx.float32:
        return cast(mx.array, causal_softmax((q * scale) @ k.swapaxes(-1, -2))) @ v
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """-log softmax(logits)[target], in nats.

    Args:
        logits: [..., V], float32.
        targets: [...], each below V.

    Returns:
        [...]
    """
    if on_cpu():
        return cast(list[mx.array], _cross_entropy_with_exp(logits, targets[..., None]))[0]
    return nn.losses.cross_entropy(logits, targets)


@mx.custom_function
def _cross_entropy_with_exp(logits: mx.array, targets: mx.array) -> tuple[mx.array, ...]:
    """Also the exp of each logit, and their sums, kept for the backward pass."""
    highest = logits.max(axis=-1, keepdims=True)
    exp = _fence(_exp(_fence(logits - highest)))
    sums = exp.sum(axis=-1, keepdims=True)
    of_targets = mx.take_along_axis(logits, targets, axis=-1)
    return (mx.log(sums) + highest - of_targets)[..., 0], exp, sums


@_cross_entropy_with_exp.vjp
def _cross_entropy_vjp(
    primals: tuple[mx.array, mx.array], cotangents: tuple[mx.array, ...], outputs: tuple
) -> tuple[mx.array, mx.array]:
    """softmax(logits), less 1 at the target, each times its row's cotangent."""
    (_, targets), cotangent, (_, exp, sums) = primals, cotangents[0][..., None], outputs
    softmax = exp * (cotangent / sums)
    at_target = mx.take_along_axis(softmax, targets, axis=-1) - cotangent
    return mx.put_along_axis(softmax, targets, at_target, axis=-1), mx.zeros_like(targets)


@mx.custom_function
def causal_softmax(scores: mx.array) -> mx.array:
    """Row softmax of scores[..., T, T] over the positions up to the row's own; others are 0."""
    allowed = mx.tril(mx.ones(scores.shape[-2:]))
    scores = scores + (allowed - 1) * LARGE
    scores = _fence(scores - scores.max(axis=-1, keepdims=True))
    # Times `allowed`: the clamped exp leaves 2^-126 where 0 belongs, and denormal numbers are slow.
    weights = _fence(_exp(scores)) * allowed
    return weights / weights.sum(axis=-1, keepdims=True)


@causal_softmax.vjp
def _causal_softmax_vjp(scores: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    product = _fence(output * cotangent)
    return product - _fence(output * product.sum(axis=-1, keepdims=True))


@mx.custom_function
def _gelu_with_gate(x: mx.array) -> tuple[mx.array, mx.array]:
    """GELU(x) = x · gate(x), and the gate, kept for the backward pass.

    (1 + tanh u) / 2 is the sigmoid of 2u, so one exp does for both.
    """
    x = _fence(x)
    exponent = x * -GELU_SCALE * (1 + GELU_CUBIC * x * x)
    exponent = mx.where(exponent < 87.0, exponent, 87.0)
    gate = _fence(1 / (1 + _exp(exponent)))
    return _fence(x * gate), gate


@_gelu_with_gate.vjp
def _gelu_vjp(
    x: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> mx.array:
    x, cotangent, gate = _fence(x), _fence(cotangents[0]), outputs[1]
    slope = gate + x * gate * (1 - gate) * GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x)
    return _fence(cotangent * slope)


@mx.custom_function
def _silu_with_gate(x: mx.array) -> tuple[mx.array, mx.array]:
    x = _fence(x)
    exponent = mx.where(-x < 87.0, -x, 87.0)
    gate = _fence(1 / (1 + _exp(exponent)))
    return _fence(x * gate), gate


@_silu_with_gate.vjp
def _silu_vjp(
    x: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> mx.array:
    x, cotangent, gate = _fence(x), _fence(cotangents[0]), outputs[1]
    return _fence(cotangent * (gate + x * gate * (1 - gate)))


def _exp(x: mx.array) -> mx.array:
    """e^x for x ≤ 87, relative error below 3e-7; below -87 it stays at the smallest normal number.

    2^(n+f) with n in the exponent's bits and f by a polynomial (Cody & Waite, 1980).
    """
    y = x * (1 / math.log(2))
    y = mx.where(y > -126.0, y, -126.0)
    rounded = y + ROUND
    fraction = y - (rounded - ROUND)
    power = EXP2[0] * fraction + EXP2[1]
    for coefficient in EXP2[2:]:
        power = power * fraction + coefficient
    return power * mx.view(mx.left_shift(mx.view(rounded, mx.int32) + 127, 23), mx.float32)
