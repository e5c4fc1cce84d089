"""Matrix products as an M5's GPU and CUDA compute them: of float32 rounded to TF32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import pytest


def rounded_to_tf32(x: mx.array) -> mx.array:
    if x.dtype != mx.float32:
        return x
    return ((x.view(mx.uint32) + 0x1000) & 0xFFFFE000).view(mx.float32)


def round_products(patch: pytest.MonkeyPatch, where: Callable[[], bool] = lambda: True) -> None:
    """Products, and those of their gradients, of matrices that are rounded to 10 bits first."""
    exact = mx.array.__matmul__

    @mx.custom_function
    def rounded(a: mx.array, b: mx.array) -> mx.array:
        return exact(rounded_to_tf32(a), rounded_to_tf32(b))

    @rounded.vjp
    def gradients(factors: Any, cotangent: mx.array, _: mx.array) -> Any:
        factors = [rounded_to_tf32(factor) for factor in factors]
        return tuple(mx.vjp(exact, factors, [rounded_to_tf32(cotangent)])[1])

    def product(a: mx.array, b: mx.array) -> mx.array:
        return cast(mx.array, rounded(a, b)) if where() else exact(a, b)

    patch.setattr(mx.array, "__matmul__", product)
    patch.setattr(mx, "matmul", product)
    patch.setattr(
        mx, "addmm", lambda c, a, b, alpha=1.0, beta=1.0: beta * c + alpha * product(a, b)
    )
