"""KV cache: keys and values of the tokens that a model has read.

The arrays are plain tuples, so that they cross `mx.compile`; a `KVCache` is a view on them for one
forward pass. B: sequences, H: heads, D: values of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlxgpt.backend import ops

# Keys and values of one layer, [B, H, length, D] each; and of all layers.
LayerKV = tuple[mx.array, mx.array]
LayersKV = Sequence[LayerKV]


class KVCache:
    """The KV cache of one forward pass, which reads it and adds its own tokens.

    An empty cache takes whole prompts, from position 0. A filled one takes one token of each
    sequence: it is written at its position, whatever is there; beyond the cache's length in the
    place of the oldest token, with rotary positions alone (see `GPT.supports_sliding_window`).

    Args:
        layers: what earlier passes left, with room for more: see `pad_cache`.
        position: int32 [B], how many tokens were before each new one; or [1], before all.
        kv_length: how many first places are read; default: all of them.

    Attributes:
        layers: after the pass, what the next one needs.
    """

    def __init__(
        self,
        layers: LayersKV = (),
        position: mx.array | None = None,
        kv_length: int | None = None,
    ) -> None:
        self.layers = list(layers)
        self.position = position
        if position is not None:
            capacity = self.layers[0][0].shape[2]
            self._kv_length = kv_length or capacity
            self._slot = position % capacity
            self._mask = (mx.arange(self._kv_length) <= position[:, None])[:, None, None]

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Add a layer's new tokens to the cache, and attend from them to all tokens in it.

        Args:
            q, k, v: of the new tokens, [B, H, T, D]; T is 1 unless the cache was empty.

        Returns:
            [B, H, T, D]
        """
        if self.position is None:
            self.layers.append((k, v))
            return ops.causal_attention(q, k, v)
        keys, values = (
            _update_cache(old, new, self._slot)
            for old, new in zip(self.layers[layer], (k, v), strict=True)
        )
        self.layers[layer] = keys, values
        keys, values = keys[:, :, : self._kv_length], values[:, :, : self._kv_length]
        return ops.decode_attention(q, keys, values, self._mask)


class LayerCache(NamedTuple):
    """One layer of a `KVCache`."""

    cache: KVCache
    layer: int

    @property
    def position(self) -> mx.array | None:
        """See `KVCache`; None while it is empty."""
        return self.cache.position

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """See `KVCache.attend`."""
        return self.cache.attend(self.layer, q, k, v)


def pad_cache(layers: LayersKV, length: int) -> list[LayerKV]:
    """Pad a cache, so that it has room for `length` tokens."""
    padding = [(0, 0), (0, 0), (0, length - layers[0][0].shape[2]), (0, 0)]
    return [(mx.pad(keys, padding), mx.pad(values, padding)) for keys, values in layers]


def _update_cache(cache: mx.array, x: mx.array, slot: mx.array) -> mx.array:
    """The cache[B, H, length, D] with x[B, H, 1, D] at one place, [1], or each row's own, [B]."""
    if slot.size == 1:
        return mx.slice_update(cache, x, slot, axes=(2,))
    cache = mx.array(cache)  # a copy, so that the caller's stays as it is
    cache[mx.arange(len(x)), :, slot] = x[:, :, 0]
    return cache
