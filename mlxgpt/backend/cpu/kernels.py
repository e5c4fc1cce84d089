"""CPU kernels of the operations in `backend/ops.py`, which documents their shapes and arguments.

MLX computes tanh and exp on the CPU one value at a time, so that a GELU or softmax takes longer
than the matrix products around it. These kernels use only operations that a C++ compiler
vectorizes. The tests compare each with MLX's own.

Measured rules for fast compiled kernels on the CPU: no `maximum` and no `floor` (scalar calls), and
no broadcast operands (the loop becomes strided and scalar).
"""

from __future__ import annotations

import math
from typing import cast

import mlx.core as mx

from mlxgpt.backend import device
from mlxgpt.backend.cpu import weights
from mlxgpt.backend.linear import matmul

NORM_EPS = 1e-5  # epsilon of every norm
MASK_PENALTY = 1e9  # subtracted from the scores of masked positions

MIN_SIZE = 4096  # values; with fewer, MLX's own operations are faster


def use_cpu_kernel(x: mx.array, size: int) -> bool:
    """Whether these kernels are faster than MLX's own for `size` values of x's dtype."""
    return device.on_cpu() and x.dtype == mx.float32 and size >= MIN_SIZE


def cpu_linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    """`ops.linear` on the CPU, for any size and dtype."""
    if weights.is_split_faster(x, weight):
        y = weights.split_matmul(x, weight)
    elif use_cpu_kernel(x, x.size):
        y = cast(mx.array, matmul(x, weight))
    elif bias is not None:
        return mx.addmm(bias, x, weight.T)
    else:
        return x @ weight.T
    return y if bias is None else y + bias


def cpu_gelu(x: mx.array) -> mx.array:
    """GELU, tanh form."""
    return cast(tuple[mx.array, mx.array], _gelu_with_slope(x))[0]


def cpu_gelu_no_grad(x: mx.array) -> mx.array:
    """GELU, tanh form, without a gradient."""
    x = no_fuse(x)
    return no_fuse(x * _gelu_gate(x))


def cpu_silu(x: mx.array) -> mx.array:
    """SiLU, x · sigmoid(x)."""
    return cast(tuple[mx.array, mx.array], _silu_with_slope(x))[0]


def cpu_layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None) -> mx.array:
    """LayerNorm over the last axis."""
    x = cast(list[mx.array], _standardize(x))[0]
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def cpu_rms_norm(x: mx.array, weight: mx.array | None) -> mx.array:
    """RMSNorm over the last axis."""
    x = cast(list[mx.array], _normalize(x))[0]
    return x if weight is None else x * weight


def cpu_softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis, without a gradient."""
    exp = exp_minus_max(x)
    return exp * (1 / row_sums(exp))


def cpu_causal_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Causal attention: q, k, v [B, H, T, D] -> [B, H, T, D]."""
    scale = 1 / math.sqrt(q.shape[-1])
    return cast(list[mx.array], _attention_with_weights(q * scale, k, v))[0]


def cpu_decode_attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """Attention of the last token of each sequence, [B, H, 1, D], without a gradient."""
    exp = exp_minus_max(decode_scores(q * (1 / math.sqrt(q.shape[-1])), k, mask))
    return exp @ v / row_sums(exp)


def decode_scores(q: mx.array, k: mx.array, mask: mx.array) -> mx.array:
    """Attention scores q kᵀ [B, H, 1, T], masked where `mask` is false."""
    scores = q @ k.swapaxes(-1, -2)
    return scores + broadcast_no_fuse((mask.astype(mx.float32) - 1) * MASK_PENALTY, scores)


def cpu_cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy, -log softmax(logits)[target], in nats."""
    return cast(list[mx.array], _cross_entropy_with_exp(logits, targets[..., None]))[0]


def exp_minus_max(scores: mx.array) -> mx.array:
    """exp(x - row maximum): softmax before the division by the row's sum."""
    scores = no_fuse(scores - broadcast_no_fuse(scores.max(axis=-1, keepdims=True), scores))
    return no_fuse(_exp(scores, underflow_value=0.0))


def row_sums(x: mx.array) -> mx.array:
    """Sums over the last axis, [..., 1], by a matrix product, which takes a sixth of the time."""
    return x @ mx.ones((x.shape[-1], 1))


def no_fuse(x: mx.array) -> mx.array:
    """Keep the compiler from fusing across x. No copy is made if x is contiguous."""
    return mx.contiguous(x)


def broadcast_no_fuse(x: mx.array, like: mx.array) -> mx.array:
    """Broadcast x to the shape of `like` without a copy, and keep it from being fused."""
    x = mx.broadcast_to(x, like.shape)
    return mx.depends(x, x)


@mx.custom_function
def _cross_entropy_with_exp(logits: mx.array, targets: mx.array) -> tuple[mx.array, ...]:
    """(losses [...], exp(logits - max) [..., V], row sums of these [..., 1]); the backward pass
    needs the last two. `targets` are [..., 1].
    """
    max_logits = logits.max(axis=-1, keepdims=True)
    exp = no_fuse(_exp(no_fuse(logits - broadcast_no_fuse(max_logits, logits))))
    sums = row_sums(exp)
    target_logits = mx.take_along_axis(logits, targets, axis=-1)
    return (mx.log(sums) + max_logits - target_logits)[..., 0], exp, sums


@_cross_entropy_with_exp.vjp
def _cross_entropy_vjp(
    primals: tuple[mx.array, mx.array], cotangents: tuple[mx.array, ...], outputs: tuple
) -> tuple[mx.array, mx.array]:
    """(softmax(logits) - one_hot(target)) times the cotangent of each row."""
    (_, targets), cotangent, (_, exp, sums) = primals, cotangents[0][..., None], outputs
    softmax = exp * broadcast_no_fuse(cotangent / sums, exp)
    at_target = mx.take_along_axis(softmax, targets, axis=-1) - cotangent
    return mx.put_along_axis(softmax, targets, at_target, axis=-1), mx.zeros_like(targets)


@mx.custom_function
def _attention_with_weights(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, ...]:
    """(output [B, H, T, D], unnormalized weights [B, H, key, query], 1 / their sums [B, H, T, 1]);
    the backward pass needs all three.

    A query's weights are a column, because MLX computes maximum and sum of columns several times as
    fast as those of rows.
    """
    T = q.shape[-2]
    causal_mask = mx.triu(mx.ones((T, T)))  # [key, query]
    scores = k @ q.swapaxes(-1, -2)
    scores = scores + broadcast_no_fuse((causal_mask - 1) * MASK_PENALTY, scores)
    scores = no_fuse(scores - broadcast_no_fuse(scores.max(axis=-2, keepdims=True), scores))
    weights = no_fuse(_exp(scores, underflow_value=0.0))
    inverse_sums = 1 / weights.sum(axis=-2)[..., None]
    y = weights.swapaxes(-1, -2) @ v
    return y * inverse_sums, weights, inverse_sums


@_attention_with_weights.vjp
def _attention_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    """Softmax p with cotangent c has the gradient p · (c - Σ p c), where the sum equals that of the
    output times its cotangent (FlashAttention; Dao et al., 2022, appendix B).
    """
    (q, k, v), (y, weights, inverse_sums) = primals, outputs
    cotangent = cotangents[0] * inverse_sums
    weight_cotangent = v @ cotangent.swapaxes(-1, -2)
    mean = row_sums(cotangent * y).swapaxes(-1, -2)
    centered = no_fuse(weight_cotangent - broadcast_no_fuse(mean, weight_cotangent))
    score_gradient = centered * weights
    return score_gradient.swapaxes(-1, -2) @ k, score_gradient @ q, weights @ cotangent


@mx.custom_function
def _standardize(x: mx.array) -> tuple[mx.array, mx.array]:
    """(x with mean 0 and variance 1 over the last axis, 1 / standard deviation [..., 1])."""
    return _divide_by_rms(no_fuse(x - row_sums(x) / x.shape[-1]))


@_standardize.vjp
def _standardize_vjp(
    primal: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> mx.array:
    cotangent, (x, inverse), n = no_fuse(cotangents[0]), outputs, primal.shape[-1]
    projection = row_sums(cotangent * x) / n
    return (cotangent - row_sums(cotangent) / n - x * projection) * inverse


@mx.custom_function
def _normalize(x: mx.array) -> tuple[mx.array, mx.array]:
    """(x with a root mean square of 1 over the last axis, 1 / root mean square [..., 1])."""
    return _divide_by_rms(no_fuse(x))


@_normalize.vjp
def _normalize_vjp(
    primal: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> mx.array:
    cotangent, (x, inverse) = no_fuse(cotangents[0]), outputs
    return (cotangent - x * (row_sums(cotangent * x) / primal.shape[-1])) * inverse


def _divide_by_rms(x: mx.array) -> tuple[mx.array, mx.array]:
    inverse = mx.rsqrt(row_sums(x * x) / x.shape[-1] + NORM_EPS)
    return no_fuse(x * inverse), inverse


GELU_SCALE = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


@mx.custom_function
def _gelu_with_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    """(x · gate(x), its derivative), so that the backward pass does not need x."""
    x = no_fuse(x)
    gate = _gelu_gate(x)
    slope = gate + x * gate * (1 - gate) * GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x)
    return no_fuse(x * gate), no_fuse(slope)


@_gelu_with_slope.vjp
def _gelu_vjp(
    x: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> mx.array:
    return cotangents[0] * outputs[1]


def _gelu_gate(x: mx.array) -> mx.array:
    """(1 + tanh u) / 2, computed as sigmoid(2u), which needs only one exp."""
    exponent = x * -GELU_SCALE * (1 + GELU_CUBIC * x * x)
    return 1 / (1 + _exp(mx.where(exponent < 87.0, exponent, 87.0)))


@mx.custom_function
def _silu_with_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    """(x · sigmoid(x), its derivative)."""
    x = no_fuse(x)
    exponent = mx.where(-x < 87.0, -x, 87.0)
    gate = 1 / (1 + _exp(exponent))
    return no_fuse(x * gate), no_fuse(gate + x * gate * (1 - gate))


@_silu_with_slope.vjp
def _silu_vjp(
    x: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> mx.array:
    return cotangents[0] * outputs[1]


# Coefficients of a polynomial for 2^f on [-1/2, 1/2], highest power first.
EXP2_COEFFICIENTS = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
ROUND_TO_INTEGER = 12582912.0  # 1.5 · 2^23: adding it rounds to an integer, kept in the low bits


def _exp(x: mx.array, underflow_value: float | None = None) -> mx.array:
    """e^x for x ≤ 87, with a relative error below 3e-7. For x < -87, the result is the smallest
    normal number, or `underflow_value`.

    Computed as 2^(n+f): n sets the exponent bits, and 2^f is a polynomial (Cody & Waite, 1980).
    """
    exponent = x * (1 / math.log(2))
    clamped = mx.where(exponent > -126.0, exponent, -126.0)
    rounded = clamped + ROUND_TO_INTEGER
    fraction = clamped - (rounded - ROUND_TO_INTEGER)
    power = EXP2_COEFFICIENTS[0] * fraction + EXP2_COEFFICIENTS[1]
    for coefficient in EXP2_COEFFICIENTS[2:]:
        power = power * fraction + coefficient
    result = power * mx.view(mx.left_shift(mx.view(rounded, mx.int32) + 127, 23), mx.float32)
    if underflow_value is None:
        return result
    return mx.where(exponent > -126.0, result, underflow_value)
