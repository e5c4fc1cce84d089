"""Rotary position embedding (RoPE, Su et al., 2021)."""

from __future__ import annotations

import mlx.core as mx

ROPE_BASE = 10_000.0  # base of the rotation frequencies, as in the paper


def apply_rope(x: mx.array, position: mx.array | int | None) -> mx.array:
    """Rotate queries or keys x [B, H, T, D], which start at `position` (default: 0): dimensions i
    and i + D/2 by the position times `rope_frequencies(D)[i]`.
    """
    if isinstance(position, mx.array) and position.size == 1:
        position = position.reshape(())  # with shape [1], GPU kernels would read B values
    offset = 0 if position is None else position
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=ROPE_BASE, scale=1.0, offset=offset)


def rope_frequencies(head_size: int) -> mx.array:
    """Angle in radians per position for each pair of dimensions, [D/2], from 1 downwards."""
    half = head_size // 2
    return ROPE_BASE ** (-mx.arange(half) / half)
