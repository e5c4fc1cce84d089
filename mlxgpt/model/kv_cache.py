"""KV cache: keys and values of the tokens that a model has processed.

The arrays are in plain tuples, so that they can cross `mx.compile`; `KVCache` wraps them for one
forward pass. B: batch size, H: heads, D: head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlxgpt.backend import ops

# Keys and values of one layer, each [B, H, length, D], and of all layers. With a smear, the first
# entry has one array, the embeddings [B, 1, length, C].
LayerKV = tuple[mx.array, ...]
LayersKV = Sequence[LayerKV]


class KVCache:
    """KV cache of one forward pass, which reads it and adds the new tokens.

    An empty cache takes whole prompts, starting at position 0. A filled cache takes one token per
    sequence and writes it to the slot of its position. Beyond the cache's length, the new token
    overwrites the oldest one; this needs rotary positions (see `GPT.supports_sliding_window`).

    Args:
        layers: keys and values of earlier passes, padded for the new tokens: see `pad_cache`.
        position: int32, position of each sequence's new token [B], or of all sequences [1].
        kv_length: number of slots to read from the start of the cache; default: all.

    Attributes:
        layers: updated keys and values, for the next pass.
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
            q, k, v: [B, H, T, D] of the new tokens; T is 1 unless the cache was empty.

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

    def shift(self, layer: int, x: mx.array) -> mx.array:
        """Add new tokens' vectors x [B, T, C] to the cache.

        Returns:
            the vector of the token before each, [B, T, C]; zeros before the first token
        """
        if self.position is None:
            self.layers.append((x[:, None],))  # [B, 1, T, C]
            return shift_right(x)
        (cached,) = self.layers[layer]
        self.layers[layer] = (_update_cache(cached, x[:, None], self._slot),)
        previous_slot = mx.broadcast_to((self.position - 1) % cached.shape[2], (len(x),))
        return mx.take_along_axis(cached[:, 0], previous_slot[:, None, None], axis=1)


class LayerCache(NamedTuple):
    """One layer of a `KVCache`."""

    cache: KVCache
    layer: int

    @property
    def position(self) -> mx.array | None:
        """Position of the new tokens, see `KVCache`; None if the cache is empty."""
        return self.cache.position

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """See `KVCache.attend`."""
        return self.cache.attend(self.layer, q, k, v)

    def shift(self, x: mx.array) -> mx.array:
        """See `KVCache.shift`."""
        return self.cache.shift(self.layer, x)


def shift_right(x: mx.array) -> mx.array:
    """X [B, T, C] moved to the next position, with zeros at the first."""
    return mx.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0)])


def pad_cache(layers: LayersKV, length: int) -> list[LayerKV]:
    """Pad a cache to `length` tokens."""
    padding = [(0, 0), (0, 0), (0, length - layers[0][0].shape[2]), (0, 0)]
    return [tuple(mx.pad(array, padding) for array in layer) for layer in layers]


def _update_cache(cache: mx.array, x: mx.array, slot: mx.array) -> mx.array:
    """Write x [B, H, 1, D] to a copy of the cache [B, H, length, D], at one slot [1] or each row's
    own [B].
    """
    if slot.size == 1:
        return mx.slice_update(cache, x, slot, axes=(2,))
    cache = mx.array(cache)  # a copy, so that the caller's array does not change
    cache[mx.arange(len(x)), :, slot] = x[:, :, 0]
    return cache
