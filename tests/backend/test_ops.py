"""Test which operations use mlxgpt's CPU kernels and which use MLX's own."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from mlxgpt.backend import device, ops
from mlxgpt.backend.cpu import kernels

ROW = mx.zeros((1, 1, 8, 512))
CALLS: dict[str, Callable[[mx.array], mx.array]] = {
    "cpu_gelu": ops.gelu,
    "cpu_gelu_no_grad": lambda x: ops.gelu(x, gradient=False),
    "cpu_silu": ops.silu,
    "cpu_softmax": ops.softmax,
    "cpu_layer_norm": lambda x: ops.layer_norm(x, None, None),
    "cpu_rms_norm": ops.rms_norm,
    "cpu_causal_attention": lambda x: ops.causal_attention(x, x, x),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("x", "on_cpu", "is_ours"),
    [
        (ROW, True, True),
        (ROW[..., :128], True, False),
        (ROW.astype(mx.bfloat16), True, False),
        (ROW, False, False),
    ],
    ids=["float32", "few", "bfloat16", "GPU"],
)
def test_cpu_kernels_are_used_for_large_float32_arrays_on_the_cpu(
    name: str, x: mx.array, on_cpu: bool, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    original = getattr(kernels, name)

    def recorded(*arrays: mx.array) -> mx.array:
        called.append(name)
        return original(*arrays)

    monkeypatch.setattr(kernels, name, recorded)
    monkeypatch.setattr(device, "on_cpu", lambda: on_cpu)
    y = CALLS[name](x)
    assert called == [name] * is_ours
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize(("places", "is_ours"), [(64, True), (63, False)])
def test_decode_attention_uses_the_cpu_kernel_for_a_long_cache(
    places: int, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size that counts is the size of the scores."""
    called: list[int] = []
    original = kernels.cpu_decode_attention

    def recorded(*arrays: mx.array) -> mx.array:
        called.append(places)
        return original(*arrays)

    monkeypatch.setattr(kernels, "cpu_decode_attention", recorded)
    monkeypatch.setattr(device, "on_cpu", lambda: True)
    k = mx.zeros((16, 4, places, 8))
    ops.decode_attention(k[:, :, :1], k, k, mx.ones((1, 1, 1, places), mx.bool_))
    assert called == [places] * is_ours


def test_cross_entropy_always_uses_the_cpu_kernel_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[bool] = []
    monkeypatch.setattr(kernels, "cpu_cross_entropy", lambda logits, targets: called.append(True))
    for on_cpu in (True, False):
        monkeypatch.setattr(device, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        ops.cross_entropy(mx.zeros((1, 3)), mx.array([1]))
    assert called == [True]
