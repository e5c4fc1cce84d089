"""Recording of activations in a forward pass, and ablation of attention heads."""

from __future__ import annotations

import math
from collections.abc import Iterable

import mlx.core as mx

from mlxgpt.backend import ops


class ActivationRecorder:
    """Records the activations of one forward pass over whole sequences.

    Args:
        ablated_heads: (layer, head) of each head whose output is zero in this pass.

    Attributes:
        attention: each layer's attention weights, [B, H, T, T], rows summing to 1, float32.
        residual: the residual stream [B, T, C] before the first block and after each one.
    """

    def __init__(self, ablated_heads: Iterable[tuple[int, int]] = ()) -> None:
        self.attention: list[mx.array] = []
        self.residual: list[mx.array] = []
        self._ablated_heads = set(ablated_heads)

    def record_residual(self, x: mx.array) -> None:
        """Keep the residual stream [B, T, C] before a block, or after the last one."""
        self.residual.append(x)

    def record_attention(self, q: mx.array, k: mx.array, y: mx.array) -> mx.array:
        """Keep the next layer's attention weights, and apply the ablations.

        Args:
            q, k: its queries and keys, [B, H, T, D].
            y: its heads' outputs, [B, H, T, D].

        Returns:
            the outputs, zero for ablated heads
        """
        layer, (T, D) = len(self.attention), q.shape[-2:]
        scores = (q.astype(mx.float32) / math.sqrt(D)) @ k.astype(mx.float32).swapaxes(-1, -2)
        scores = mx.where(mx.tri(T, dtype=mx.bool_), scores, float("-inf"))
        self.attention.append(ops.softmax(scores))
        head_mask = [float((layer, head) not in self._ablated_heads) for head in range(q.shape[1])]
        return y * mx.array(head_mask, dtype=y.dtype)[:, None, None] if 0.0 in head_mask else y
