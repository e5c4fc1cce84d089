"""The formulas that differ by backend: linear layers, GELU, SiLU, norms, attention, cross-entropy.

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

from mlxgpt.backend.embedding import lookup
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
EPS = 1e-5  # of every norm
PART = 400_000  # numbers of a weight that a single vector is multiplied with at a time
FEWEST_ROWS = 16  # in them
VECTORS = 8  # that are multiplied so at most; by a weight of more than
LARGEST = 8_000_000  # numbers, which no cache holds, twice as many
COLUMNS = 100_000  # numbers of a weight: with fewer it may be laid out by columns, and stays whole
FEW = 4096  # numbers: with fewer, MLX's own take less time
SHARED = 200_000  # numbers of a layer's keys: as many copies of a prompt's take longer to read than
# the prompt's own take to be kept apart

_fence = mx.contiguous


def _ours(x: mx.array, size: int) -> bool:
    """Whether what is below is faster than MLX's own, for so many numbers as x."""
    return on_cpu() and x.dtype == mx.float32 and size >= FEW


def embedding(weight: mx.array, ids: mx.array) -> mx.array:
    """Rows of weight[V, C] at ids[...]: [..., C]."""
    return weight[ids] if on_cpu() else cast(mx.array, lookup(weight, ids))


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x[..., I] times weight[O, I], transposed, plus bias[O]: [..., O]."""
    if on_cpu() and _by_parts(x.size // x.shape[-1], weight.size):
        y = _product_of_few(x, weight)
        return y if bias is None else y + bias
    if _ours(x, x.size):
        y = cast(mx.array, _product(x, weight))
        return y if bias is None else y + bias
    if on_cpu():
        return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    if bias is None:
        return cast(mx.array, _product(x, weight))
    return cast(mx.array, _product_plus_bias(x, weight, bias))


def by_columns(weight: mx.array) -> mx.array:
    """The same weight[O, I]; on the CPU, if it is small, with column behind column in memory.
    `linear` of a few rows then takes as little as half the time. Without a gradient.
    """
    if not on_cpu() or weight.size >= COLUMNS:
        return weight
    return mx.contiguous(weight.T).T


def gelu(x: mx.array, *, gradient: bool = True) -> mx.array:
    """GELU in its tanh form (Hendrycks & Gimpel, 2016), as GPT-2 has it; any shape. Without a
    gradient in less time.
    """
    if _ours(x, 3 * x.size):  # tanh takes MLX long
        if not gradient:
            x = _fence(x)
            return _fence(x * _gelu_gate(x))
        return cast(tuple[mx.array, mx.array], _gelu_with_slope(x))[0]
    return nn.gelu_approx(x)


def silu(x: mx.array) -> mx.array:
    """X · sigmoid(x); any shape."""
    if _ours(x, x.size):
        return cast(tuple[mx.array, mx.array], _silu_with_slope(x))[0]
    return nn.silu(x)


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None) -> mx.array:
    """X with mean 0 and variance 1 along its last axis, times weight, plus bias; any shape."""
    if _ours(x, x.size):
        x = cast(list[mx.array], _standardised(x))[0]
        x = x if weight is None else x * weight
        return x if bias is None else x + bias
    return mx.fast.layer_norm(x, weight, bias, EPS)


def softmax(x: mx.array) -> mx.array:
    """e^x over the sum of these along the last axis; any shape. Without a gradient."""
    if _ours(x, x.size):
        exp = _softmax_of_rows(x)
        return exp * (1 / _row_sums(exp))
    return mx.softmax(x, axis=-1)


def rms_norm(x: mx.array, weight: mx.array | None = None) -> mx.array:
    """X with a root mean square of 1 along its last axis, times weight; any shape."""
    if _ours(x, x.size):
        x = cast(list[mx.array], _of_unit_size(x))[0]
        return x if weight is None else x * weight
    return mx.fast.rms_norm(x, weight, EPS)


def causal_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """softmax(q kᵀ / √D) v, each position seeing itself and those before it.

    Args:
        q, k, v: [B, H, T, D].

    Returns:
        [B, H, T, D]
    """
    scale = 1 / math.sqrt(q.shape[-1])
    if _ours(q, q.size):
        return cast(list[mx.array], _attention_with_weights(q * scale, k, v))[0]
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")


def decode_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    seen: mx.array,
    prompt: tuple[mx.array, mx.array] | None = None,
) -> mx.array:
    """softmax(q kᵀ / √D) v for the last token of each sequence; without a gradient.

    Args:
        q: [B, H, 1, D].
        k, v: [B, H, T, D].
        seen: bool [B or 1, 1, 1, T], of which places of k and v.
        prompt: keys and values[1, H, P, D] that all sequences see besides; see `shares_prompt`.

    Returns:
        [B, H, 1, D]
    """
    scale = 1 / math.sqrt(q.shape[-1])
    length = prompt[0].shape[2] if prompt else 0
    if _ours(q, q.shape[0] * q.shape[1] * (length + k.shape[2])):
        q = q * scale
        scores = q @ k.swapaxes(-1, -2)
        scores = scores + _spread((seen.astype(mx.float32) - 1) * LARGE, scores)
        if prompt is None:
            weights = _softmax_of_rows(scores)
            return weights @ v / _row_sums(weights)
        # All sequences' queries are the rows of one matrix, and the prompt is read once.
        of_prompt = q.swapaxes(0, 2) @ prompt[0].swapaxes(-1, -2)  # [1, H, B, P]
        weights = _softmax_of_rows(mx.concatenate([of_prompt.swapaxes(0, 2), scores], axis=-1))
        of_prompt = weights[..., :length].swapaxes(0, 2) @ prompt[1]
        return (weights[..., length:] @ v + of_prompt.swapaxes(0, 2)) / _row_sums(weights)
    if prompt is not None:
        k, v = (
            mx.concatenate([mx.broadcast_to(p, (len(x), *p.shape[1:])), x], axis=2)
            for p, x in zip(prompt, (k, v), strict=True)
        )
        seen = mx.pad(seen, [(0, 0)] * 3 + [(length, 0)], constant_values=True)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=seen)


def shares_prompt(keys: mx.array, sequences: int) -> bool:
    """Whether attention takes less time where the keys[1, H, P, D] that so many sequences begin
    with are kept once, and not with each.
    """
    return on_cpu() and keys.dtype == mx.float32 and sequences * keys.size >= SHARED


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
    exp = _fence(_exp(_fence(logits - _spread(highest, logits))))
    sums = _row_sums(exp)
    of_targets = mx.take_along_axis(logits, targets, axis=-1)
    return (mx.log(sums) + highest - of_targets)[..., 0], exp, sums


@_cross_entropy_with_exp.vjp
def _cross_entropy_vjp(
    primals: tuple[mx.array, mx.array], cotangents: tuple[mx.array, ...], outputs: tuple
) -> tuple[mx.array, mx.array]:
    """softmax(logits), less 1 at the target, each times its row's cotangent."""
    (_, targets), cotangent, (_, exp, sums) = primals, cotangents[0][..., None], outputs
    softmax = exp * _spread(cotangent / sums, exp)
    at_target = mx.take_along_axis(softmax, targets, axis=-1) - cotangent
    return mx.put_along_axis(softmax, targets, at_target, axis=-1), mx.zeros_like(targets)


@mx.custom_function
def _product(x: mx.array, weight: mx.array) -> mx.array:
    """The product of x and the weight, transposed. MLX's own gradient of the weight is transposed
    in memory: the optimizer's fused kernels then read weight, moments and gradient by their
    strides, number by number (`compiled_check_contiguity` in MLX's sources). This one is laid out
    like the weight.
    """
    return x @ weight.T


@_product.vjp
def _product_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    return _product_gradients(*primals, cotangent)[:2]


@mx.custom_function
def _product_plus_bias(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """As `_product`, with the bias in the same kernel, as GPUs have it."""
    return mx.addmm(bias, x, weight.T)


@_product_plus_bias.vjp
def _product_plus_bias_vjp(
    primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    x, weight, _ = primals
    of_x, of_weight, of_rows = _product_gradients(x, weight, cotangent)
    return of_x, of_weight, of_rows.sum(axis=0)


def _product_gradients(
    x: mx.array, weight: mx.array, cotangent: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Those of x[..., I] and weight[O, I]; and the cotangent's rows, [N, O]."""
    rows, of_rows = (z.reshape(-1, z.shape[-1]) for z in (x, cotangent))
    return (of_rows @ weight).reshape(x.shape), of_rows.T @ rows, of_rows


def _by_parts(vectors: int, size: int) -> bool:
    """Whether so many vectors are multiplied with a weight of such a size by `_product_of_few`."""
    most = 2 * VECTORS if size > LARGEST else VECTORS
    return 0 < vectors <= most and vectors * size > PART and size >= COLUMNS


def _product_of_few(x: mx.array, weight: mx.array) -> mx.array:
    """x[..., I] of one row or a few: by as many rows of the weight at a time as OpenBLAS multiplies
    without copying them first, which takes as long again.
    """
    rows, length = weight.shape
    fewest = -(-weight.size * (x.size // length) // PART)
    parts = next((n for n in range(fewest, rows + 1) if rows % n == 0), rows)
    if rows // parts < FEWEST_ROWS:
        return x @ weight.T
    y = x.reshape(-1, length) @ weight.reshape(parts, rows // parts, length).swapaxes(1, 2)
    return y.swapaxes(0, 1).reshape(*x.shape[:-1], rows)


def _softmax_of_rows(scores: mx.array) -> mx.array:
    """Not yet divided by each row's sum."""
    scores = _fence(scores - _spread(scores.max(axis=-1, keepdims=True), scores))
    return _fence(_exp(scores, below=0.0))


@mx.custom_function
def _attention_with_weights(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, ...]:
    """Also what the backward pass needs: each query's weights before they are divided by their sum,
    one column each (MLX takes the maximum and the sum of columns several times as fast as of rows),
    and 1 / that sum, [B, H, T, 1].
    """
    T = q.shape[-2]
    seen = mx.triu(mx.ones((T, T)))  # [key, query]
    scores = k @ q.swapaxes(-1, -2)
    scores = scores + _apart(mx.broadcast_to((seen - 1) * LARGE, scores.shape))
    scores = _fence(scores - _spread(scores.max(axis=-2, keepdims=True), scores))
    weights = _fence(_exp(scores, below=0.0))
    share = 1 / weights.sum(axis=-2)[..., None]
    y = weights.swapaxes(-1, -2) @ v
    return y * share, weights, share


@_attention_with_weights.vjp
def _attention_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    """Of a softmax p with cotangent c the gradient is p · (c - Σ p c), and that sum is also the one
    of y · cotangent of y (FlashAttention; Dao et al., 2022, appendix B).
    """
    (q, k, v), (y, weights, share) = primals, outputs
    cotangent = cotangents[0] * share
    of_weights = v @ cotangent.swapaxes(-1, -2)
    mean = _row_sums(cotangent * y).swapaxes(-1, -2)
    of_scores = _fence(of_weights - _spread(mean, of_weights)) * weights
    return of_scores.swapaxes(-1, -2) @ k, of_scores @ q, weights @ cotangent


@mx.custom_function
def _standardised(x: mx.array) -> tuple[mx.array, mx.array]:
    """Also what it was divided by, inverted: [..., 1]."""
    return _sized(_fence(x - _row_sums(x) / x.shape[-1]))


@_standardised.vjp
def _standardised_vjp(
    primal: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> mx.array:
    cotangent, (x, inverse), n = _fence(cotangents[0]), outputs, primal.shape[-1]
    along = _row_sums(cotangent * x) / n
    return (cotangent - _row_sums(cotangent) / n - x * along) * inverse


@mx.custom_function
def _of_unit_size(x: mx.array) -> tuple[mx.array, mx.array]:
    """As `_standardised`, but for the mean."""
    return _sized(_fence(x))


@_of_unit_size.vjp
def _of_unit_size_vjp(
    primal: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> mx.array:
    cotangent, (x, inverse) = _fence(cotangents[0]), outputs
    return (cotangent - x * (_row_sums(cotangent * x) / primal.shape[-1])) * inverse


def _sized(x: mx.array) -> tuple[mx.array, mx.array]:
    inverse = mx.rsqrt(_row_sums(x * x) / x.shape[-1] + EPS)
    return _fence(x * inverse), inverse


@mx.custom_function
def _gelu_with_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    """GELU(x) = x · gate(x), and its slope, for the backward pass, which then needs no x."""
    x = _fence(x)
    gate = _gelu_gate(x)
    slope = gate + x * gate * (1 - gate) * GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x)
    return _fence(x * gate), _fence(slope)


@_gelu_with_slope.vjp
def _gelu_vjp(
    x: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> mx.array:
    return cotangents[0] * outputs[1]


def _gelu_gate(x: mx.array) -> mx.array:
    """(1 + tanh u) / 2, which is the sigmoid of 2u, so that one exp does."""
    exponent = x * -GELU_SCALE * (1 + GELU_CUBIC * x * x)
    return 1 / (1 + _exp(mx.where(exponent < 87.0, exponent, 87.0)))


@mx.custom_function
def _silu_with_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    x = _fence(x)
    exponent = mx.where(-x < 87.0, -x, 87.0)
    gate = 1 / (1 + _exp(exponent))
    return _fence(x * gate), _fence(gate + x * gate * (1 - gate))


@_silu_with_slope.vjp
def _silu_vjp(
    x: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> mx.array:
    return cotangents[0] * outputs[1]


def _row_sums(x: mx.array) -> mx.array:
    """Sums over the last axis, [..., 1]: as a product, which takes a sixth of the time."""
    n = x.shape[-1]
    return x @ mx.ones((n, 1))


def _spread(x: mx.array, like: mx.array) -> mx.array:
    """One row or one column for a whole matrix, repeated without a copy."""
    return _apart(mx.broadcast_to(x, like.shape))


def _apart(x: mx.array) -> mx.array:
    """X, which the compiler then does not fuse with what it goes into."""
    return mx.depends(x, x)


def _exp(x: mx.array, below: float | None = None) -> mx.array:
    """e^x for x ≤ 87, relative error below 3e-7; below -87 it stays at the smallest normal number,
    or is `below`.

    2^(n+f) with n in the exponent's bits and f by a polynomial (Cody & Waite, 1980).
    """
    exponent = x * (1 / math.log(2))
    y = mx.where(exponent > -126.0, exponent, -126.0)
    rounded = y + ROUND
    fraction = y - (rounded - ROUND)
    power = EXP2[0] * fraction + EXP2[1]
    for coefficient in EXP2[2:]:
        power = power * fraction + coefficient
    result = power * mx.view(mx.left_shift(mx.view(rounded, mx.int32) + 127, 23), mx.float32)
    return result if below is None else mx.where(exponent > -126.0, result, below)
