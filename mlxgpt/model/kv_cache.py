"""KV cache: keys and values of the tokens that a model has processed.

The arrays are in plain tuples, so that they can cross `mx.compile`; `KVCache` wraps them for one
forward pass. B: batch size, H: heads, D: head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxgpt.backend import ops

# An entry of the cache, and all entries, in the order in which the model uses them: keys and values
# of a layer, each [B, H, length, D]; or one such array, which is read shifted by a token.
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
        self._next_entry = 0
        self.position = position
        if position is not None:
            capacity = self.layers[0][0].shape[2]
            self._kv_length = kv_length or capacity
            self._slot = position % capacity
            self._mask = (mx.arange(self._kv_length) <= position[:, None])[:, None, None]

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Add new tokens to the next layer of the cache, and attend from them to all tokens in it.

        Args:
            q, k, v: [B, H, T, D] of the new tokens; T is 1 unless the cache was empty.

        Returns:
            [B, H, T, D]
        """
        if self.position is None:
            self.layers.append((k, v))
            return ops.causal_attention(q, k, v)
        keys, values = self._update(k, v)
        keys, values = keys[:, :, : self._kv_length], values[:, :, : self._kv_length]
        return ops.decode_attention(q, keys, values, self._mask)

    def shift(self, x: mx.array) -> mx.array:
        """Add new tokens' vectors x [B, H, T, D] to the next entry of the cache.

        Returns:
            the vectors of the token before each, [B, H, T, D]; zeros before the first token
        """
        if self.position is None:
            self.layers.append((x,))
            return shift_right(x)
        (cached,) = self.layers[self._next_entry]
        self._update(x)
        previous_slot = mx.broadcast_to((self.position - 1) % cached.shape[2], (len(x),))
        return mx.take_along_axis(cached, previous_slot[:, None, None, None], axis=2)

    def _update(self, *new: mx.array) -> LayerKV:
        """Write new arrays to the next entry, and return it."""
        entry, self._next_entry = self._next_entry, self._next_entry + 1
        pairs = zip(self.layers[entry], new, strict=True)
        self.layers[entry] = tuple(_update_cache(old, x, self._slot) for old, x in pairs)
        return self.layers[entry]


def shift_right(x: mx.array) -> mx.array:
    """X [B, H, T, D] moved to the next position, with zeros at the first."""
    return mx.pad(x[:, :, :-1], [(0, 0), (0, 0), (1, 0), (0, 0)])


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
