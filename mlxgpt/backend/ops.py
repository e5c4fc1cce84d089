"""Operations of a model: embedding, linear layer, GELU, SiLU, norms, attention, cross-entropy.

On a GPU these call MLX's kernels; on a CPU, those of `cpu/kernels.py` where they are faster.
"""

from __future__ import annotations

import math
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlxgpt.backend import device
from mlxgpt.backend.cpu import kernels, weights
from mlxgpt.backend.cpu.kernels import NORM_EPS, use_cpu_kernel
from mlxgpt.backend.embedding import embedding_lookup
from mlxgpt.backend.linear import matmul, matmul_plus_bias


def embedding(weight: mx.array, ids: mx.array) -> mx.array:
    """Rows of `weight` [V, C] at `ids` [...]: [..., C]."""
    if device.on_cpu():
        return weight[ids]
    return cast(mx.array, embedding_lookup(weight, ids))


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """Product of x [..., I] and the transposed `weight` [O, I], plus `bias` [O]: [..., O]."""
    if device.on_cpu():
        return kernels.cpu_linear(x, weight, bias)
    if bias is None:
        return cast(mx.array, matmul(x, weight))
    return cast(mx.array, matmul_plus_bias(x, weight, bias))


def to_column_major(weight: mx.array) -> mx.array:
    """`weight` [O, I] in the memory layout that is fastest for decoding; no gradient."""
    return weights.cpu_to_column_major(weight) if device.on_cpu() else weight


def gelu(x: mx.array, *, gradient: bool = True) -> mx.array:
    """GELU in its tanh form (Hendrycks & Gimpel, 2016), as in GPT-2; any shape.

    Args:
        gradient: False if the result is not differentiated, which is faster on a CPU.
    """
    if use_cpu_kernel(x, 3 * x.size):  # MLX's tanh is slow
        return kernels.cpu_gelu(x) if gradient else kernels.cpu_gelu_no_grad(x)
    return nn.gelu_approx(x)


def silu(x: mx.array) -> mx.array:
    """SiLU, x · sigmoid(x); any shape."""
    if use_cpu_kernel(x, x.size):
        return kernels.cpu_silu(x)
    return nn.silu(x)


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None) -> mx.array:
    """LayerNorm over the last axis of x [..., C], with `weight` [C] and `bias` [C]: [..., C]."""
    if use_cpu_kernel(x, x.size):
        return kernels.cpu_layer_norm(x, weight, bias)
    return mx.fast.layer_norm(x, weight, bias, NORM_EPS)


def rms_norm(x: mx.array, weight: mx.array | None = None) -> mx.array:
    """RMSNorm (Zhang & Sennrich, 2019) over the last axis of x [..., C], with `weight` [C]:
    [..., C].
    """
    if use_cpu_kernel(x, x.size):
        return kernels.cpu_rms_norm(x, weight)
    return mx.fast.rms_norm(x, weight, NORM_EPS)


def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis; any shape. No gradient on a CPU."""
    if use_cpu_kernel(x, x.size):
        return kernels.cpu_softmax(x)
    return mx.softmax(x, axis=-1)


def causal_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Causal attention, softmax(q kᵀ / √D) v: each position attends to itself and earlier ones.

    Args:
        q, k, v: [B, H, T, D].

    Returns:
        [B, H, T, D]
    """
    if use_cpu_kernel(q, q.size):
        return kernels.cpu_causal_attention(q, k, v)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=_scale(q), mask="causal")


def decode_attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """Attention of the last token of each sequence, for decoding. No gradient on a CPU.

    Args:
        q: [B, H, 1, D].
        k, v: [B, H, T, D].
        mask: bool [B or 1, 1, 1, T], true for the positions to attend to.

    Returns:
        [B, H, 1, D]
    """
    B, H = q.shape[:2]
    if use_cpu_kernel(q, B * H * k.shape[2]):
        return kernels.cpu_decode_attention(q, k, v, mask)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=_scale(q), mask=mask)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy, -log softmax(logits)[target], in nats.

    Args:
        logits: [..., V], float32.
        targets: [...], each below V.

    Returns:
        [...]
    """
    if device.on_cpu():
        return kernels.cpu_cross_entropy(logits, targets)
    return nn.losses.cross_entropy(logits, targets)


def _scale(q: mx.array) -> float:
    return 1 / math.sqrt(q.shape[-1])
