"""Attention of many sequences that begin with one prompt, whose keys and values are kept once."""

from __future__ import annotations

import math

import mlx.core as mx

from mlxgpt.backend.cpu import kernels

# Values of a layer's keys over all sequences. With more, reading a copy for each sequence takes
# longer than computing the attention to the prompt separately.
MIN_KEYS = 200_000


def is_faster(keys: mx.array, sequences: int) -> bool:
    """Whether the prompt's keys [1, H, P, D] are better kept once for all `sequences`."""
    return keys.dtype == mx.float32 and sequences * keys.size >= MIN_KEYS


def decode_attention(
    q: mx.array, k: mx.array, v: mx.array, seen: mx.array, prompt: tuple[mx.array, mx.array]
) -> mx.array:
    """`ops.decode_attention` with the keys and values of a shared prompt."""
    (prompt_k, prompt_v), length = prompt, prompt[0].shape[2]
    B, H, _, D = q.shape
    if not kernels.use_cpu_kernel(q, B * H * (length + k.shape[2])):
        return _decode_attention_with_copies(q, k, v, seen, prompt)
    q = q * (1 / math.sqrt(D))
    scores = kernels.decode_scores(q, k, seen)
    # The queries of all sequences are the rows of one matrix, and the prompt is read once.
    prompt_scores = q.swapaxes(0, 2) @ prompt_k.swapaxes(-1, -2)  # [1, H, B, P]
    exp = kernels.exp_of_rows(mx.concatenate([prompt_scores.swapaxes(0, 2), scores], axis=-1))
    prompt_y = exp[..., :length].swapaxes(0, 2) @ prompt_v
    return (exp[..., length:] @ v + prompt_y.swapaxes(0, 2)) / kernels.row_sums(exp)


def _decode_attention_with_copies(
    q: mx.array, k: mx.array, v: mx.array, seen: mx.array, prompt: tuple[mx.array, mx.array]
) -> mx.array:
    """The same by MLX's own attention: the exact twin in the tests, and faster for few values."""
    k, v = (
        mx.concatenate([mx.broadcast_to(p, (len(x), *p.shape[1:])), x], axis=2)
        for p, x in zip(prompt, (k, v), strict=True)
    )
    seen = mx.pad(seen, [(0, 0)] * 3 + [(prompt[0].shape[2], 0)], constant_values=True)
    scale = 1 / math.sqrt(q.shape[-1])
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=seen)
