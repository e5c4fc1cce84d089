"""Record the activations of a forward pass, and ablate attention heads."""

from __future__ import annotations

import math
from collections.abc import Iterable

import mlx.core as mx

from mlxgpt.backend import ops


class ActivationRecorder:
    """Records the activations of one forward pass over whole sequences, without a KV cache.

    Args:
        ablated_heads: (layer, head) of each head whose output is set to zero.

    Attributes:
        attention: attention weights of each layer, [B, H, T, T], float32; each row sums to 1.
        residual: residual stream [B, T, C] before the first block and after each block.
    """

    def __init__(self, ablated_heads: Iterable[tuple[int, int]] = ()) -> None:
        self.attention: list[mx.array] = []
        self.residual: list[mx.array] = []
        self._ablated_heads = set(ablated_heads)

    def record_residual(self, x: mx.array) -> None:
        """Record the residual stream x [B, T, C]."""
        self.residual.append(x)

    def record_attention(self, q: mx.array, k: mx.array, y: mx.array) -> mx.array:
        """Record the next layer's attention weights, and ablate its heads.

        Args:
            q, k: queries and keys, [B, H, T, D].
            y: outputs of the heads, [B, H, T, D].

        Returns:
            y, with ablated heads set to zero.
        """
        layer, (T, D) = len(self.attention), q.shape[-2:]
        scores = (q.astype(mx.float32) / math.sqrt(D)) @ k.astype(mx.float32).swapaxes(-1, -2)
        scores = mx.where(mx.tri(T, dtype=mx.bool_), scores, float("-inf"))  # [B, H, T, T]
        self.attention.append(ops.softmax(scores))
        head_mask = [float((layer, head) not in self._ablated_heads) for head in range(q.shape[1])]
        return y * mx.array(head_mask, dtype=y.dtype)[:, None, None] if 0.0 in head_mask else y
