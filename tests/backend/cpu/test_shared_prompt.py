from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.backend import ops
from mlxgpt.backend.cpu import kernels, shared_prompt
from mlxgpt.machine import device
from mlxgpt.machine.device import on_cpu

pytestmark = pytest.mark.skipif(not on_cpu(), reason="for the CPU")


@pytest.mark.parametrize("rows", [1, 4])
def test_it_is_the_attention_to_copies_of_the_prompt(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """By our formula and by MLX's own."""
    keys = mx.random.split(mx.random.key(0), 5)
    q = mx.random.normal((4, 2, 1, 8), key=keys[0])
    k, v = (mx.random.normal((4, 2, 5, 8), key=key) for key in keys[1:3])
    prompt_k, prompt_v = (mx.random.normal((1, 2, 7, 8), key=key) for key in keys[3:])
    seen = (mx.arange(5) < mx.array([[3], [1], [5], [2]])[:rows])[:, None, None]
    monkeypatch.setattr(kernels, "MIN_SIZE", 0)
    ours = ops.decode_attention(q, k, v, seen, (prompt_k, prompt_v))
    monkeypatch.setattr(kernels, "MIN_SIZE", 1 << 60)
    exact = ops.decode_attention(q, k, v, seen, (prompt_k, prompt_v))
    np.testing.assert_allclose(ours, exact, atol=1e-6)
    k, v = (
        mx.concatenate([mx.repeat(p, 4, axis=0), x], axis=2)
        for p, x in ((prompt_k, k), (prompt_v, v))
    )
    seen = mx.concatenate([mx.ones((rows, 1, 1, 7), dtype=mx.bool_), seen], axis=-1)
    np.testing.assert_allclose(exact, ops.decode_attention(q, k, v, seen), atol=1e-6)


def test_it_is_for_many_values_in_float32_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = mx.zeros((1, 2, 10, 8))
    enough = -(-shared_prompt.MIN_KEYS // keys.size)
    assert ops.shares_prompt(keys, enough)
    assert not ops.shares_prompt(keys, enough - 1)
    assert not ops.shares_prompt(keys.astype(mx.float16), enough)
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    assert not ops.shares_prompt(keys, enough)
