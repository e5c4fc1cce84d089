"""What a forward pass hands out to whoever wants to see inside, and heads that it leaves out."""

from __future__ import annotations

import math
from collections.abc import Iterable

import mlx.core as mx

from mlxgpt.backend import ops


class Inside:
    """Given to `GPT.prefill`, which fills it on its way.

    Args:
        switched_off: (layer, head) of each head whose output is zero in this pass.

    Attributes:
        attention: of each layer the weights with which each position looks at those before it and
            at itself, [B, H, T, T], rows summing to 1, float32.
        residual: the residual stream[B, T, C] as it enters the first block, and as it leaves each
            one: one more than there are layers.
    """

    def __init__(self, switched_off: Iterable[tuple[int, int]] = ()) -> None:
        self.attention: list[mx.array] = []
        self.residual: list[mx.array] = []
        self._off = set(switched_off)

    def attended(self, q: mx.array, k: mx.array, y: mx.array) -> mx.array:
        """Note the next layer's weights, from its queries and keys[B, H, T, D]; its heads' outputs
        y[B, H, T, D], but for those that are switched off.
        """
        layer, (T, D) = len(self.attention), q.shape[-2:]
        scores = (q.astype(mx.float32) / math.sqrt(D)) @ k.astype(mx.float32).swapaxes(-1, -2)
        scores = mx.where(mx.tri(T, dtype=mx.bool_), scores, float("-inf"))
        self.attention.append(ops.softmax(scores))
        on = [float((layer, head) not in self._off) for head in range(q.shape[1])]
        return y * mx.array(on, dtype=y.dtype)[:, None, None] if 0.0 in on else y
