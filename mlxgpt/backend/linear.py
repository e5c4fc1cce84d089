"""Matrix products whose weight gradients have the same memory layout as the weights.

MLX's own gradient of a weight is a transposed array, so that the optimizer's fused kernels use
strided access to weight, moments and gradient, one value at a time (`compiled_check_contiguity` in
MLX's sources).
"""

from __future__ import annotations

import mlx.core as mx


@mx.custom_function
def matmul(x: mx.array, weight: mx.array) -> mx.array:
    """Product of x [..., I] and the transposed `weight` [O, I]: [..., O]."""
    return x @ weight.T


@matmul.vjp
def _matmul_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    return _gradients(*primals, cotangent)[:2]


@mx.custom_function
def matmul_plus_bias(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """`matmul` plus `bias` [O], added in the same kernel: [..., O]."""
    return mx.addmm(bias, x, weight.T)


@matmul_plus_bias.vjp
def _matmul_plus_bias_vjp(
    primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    x, weight, _ = primals
    x_gradient, weight_gradient, cotangent_rows = _gradients(x, weight, cotangent)
    return x_gradient, weight_gradient, cotangent_rows.sum(axis=0)


def _gradients(
    x: mx.array, weight: mx.array, cotangent: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of x [..., I] and `weight` [O, I], and the cotangent as rows [N, O]."""
    x_rows, cotangent_rows = (z.reshape(-1, z.shape[-1]) for z in (x, cotangent))
    x_gradient = (cotangent_rows @ weight).reshape(x.shape)
    return x_gradient, cotangent_rows.T @ x_rows, cotangent_rows
