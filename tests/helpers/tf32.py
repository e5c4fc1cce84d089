"""Emulate matmuls of M5 GPUs and CUDA, which round float32 inputs to TF32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import pytest

from tests.helpers.mlx_build import skip_if_arrays_are_immutable


def round_to_tf32(x: mx.array) -> mx.array:
    if x.dtype != mx.float32:
        return x
    return ((x.view(mx.uint32) + 0x1000) & 0xFFFFE000).view(mx.float32)


def round_matmul_inputs(
    patch: pytest.MonkeyPatch, is_rounded: Callable[[], bool] = lambda: True
) -> None:
    """Patch matmuls and their gradients to round float32 inputs to TF32's 10-bit mantissa."""
    skip_if_arrays_are_immutable()
    original_matmul = mx.array.__matmul__

    @mx.custom_function
    def rounded_matmul(a: mx.array, b: mx.array) -> mx.array:
        return original_matmul(round_to_tf32(a), round_to_tf32(b))

    @rounded_matmul.vjp
    def gradients(factors: Any, cotangent: mx.array, _: mx.array) -> Any:
        factors = [round_to_tf32(factor) for factor in factors]
        return tuple(mx.vjp(original_matmul, factors, [round_to_tf32(cotangent)])[1])

    def matmul(a: mx.array, b: mx.array) -> mx.array:
        return cast(mx.array, rounded_matmul(a, b)) if is_rounded() else original_matmul(a, b)

    patch.setattr(mx.array, "__matmul__", matmul)
    patch.setattr(mx, "matmul", matmul)
    patch.setattr(mx, "addmm", lambda c, a, b, alpha=1.0, beta=1.0: beta * c + alpha * matmul(a, b))
