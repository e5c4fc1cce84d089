from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.backend import device, ops
from mlxgpt.backend.cpu import kernels


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_equal_mlx_and_have_the_layout_of_the_weight(
    on_cpu: bool, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "on_cpu", lambda: on_cpu)
    monkeypatch.setattr(kernels, "MIN_SIZE", 0)
    x = mx.random.normal((2, 5, 6), key=mx.random.key(0))
    weight = mx.random.normal((4, 6), key=mx.random.key(1))
    parameters = (weight, mx.arange(4.0)) if has_bias else (weight,)

    def plain(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
        return x @ weight.T if bias is None else x @ weight.T + bias

    def gradients(f: Callable[..., mx.array]) -> list[np.ndarray]:
        arguments = tuple(range(1 + len(parameters)))
        result: Any = mx.grad(lambda *arrays: (f(*arrays) ** 2).sum(), arguments)(x, *parameters)
        mx.eval(result)
        return [np.asarray(gradient) for gradient in result]

    mlxgpt_gradients, mlx_gradients = gradients(ops.linear), gradients(plain)
    assert mlxgpt_gradients[1].strides == np.asarray(weight).strides == (24, 4)
    assert mlx_gradients[1].strides != (24, 4), "MLX does it now"
    for actual, expected in zip(mlxgpt_gradients, mlx_gradients, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
