from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt import config_files
from mlxgpt.backend import ops
from mlxgpt.config import Config, override
from mlxgpt.model.gpt import GPT
from mlxgpt.model.inside import Inside
from tests.inference.models import lively
from tests.trainings import MODERN_PARTS

IDS = np.array([[3, 1, 4, 1, 5, 9, 2]])
LAST = mx.array([IDS.shape[1] - 1])


@pytest.fixture(scope="module", params=["classic", "modern"])
def model(request: pytest.FixtureRequest, tiny_model: Config) -> GPT:
    parts = MODERN_PARTS if request.param == "modern" else {}
    return lively(override(tiny_model, parts))


def looked(model: GPT, off: Any = ()) -> tuple[mx.array, Inside]:
    inside = Inside(off)
    return model.prefill(mx.array(IDS), LAST, inside)[0], inside


def test_attention_is_that_of_the_pass(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows sum to 1, nobody looks ahead, and the values weighted by it are what went on."""
    real, passed = ops.causal_attention, []

    def recorded(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        passed.append((v, real(q, k, v)))
        return passed[-1][1]

    monkeypatch.setattr(ops, "causal_attention", recorded)
    _, inside = looked(model)
    assert len(inside.attention) == len(passed) == len(model.h)
    for weights, (v, y) in zip(inside.attention, passed, strict=True):
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
        np.testing.assert_array_equal(weights, mx.tril(weights))
        np.testing.assert_allclose(weights @ v, y, atol=1e-5)
        assert np.abs(np.array(weights[0, 0] - weights[0, 1])).max() > 1e-3, "heads differ"


def test_the_last_lens_is_the_models_own(model: GPT) -> None:
    logits, inside = looked(model)
    assert len(inside.residual) == len(model.h) + 1
    np.testing.assert_allclose(model.lens(inside.residual[-1]), model(mx.array(IDS)), atol=1e-5)
    np.testing.assert_array_equal(inside.residual[0], _embedded(model))
    np.testing.assert_allclose(model.lens(inside.residual[-1][:, -1]), logits, atol=1e-5)


def _embedded(model: GPT) -> mx.array:
    x = model._embedded(mx.array(IDS))
    return x + model.wpe.weight[: IDS.shape[1]] if "wpe" in model else x


def test_looking_changes_nothing(model: GPT) -> None:
    logits, _ = looked(model)
    unseen, _ = model.prefill(mx.array(IDS), LAST)
    np.testing.assert_array_equal(logits, unseen)


def test_a_head_switched_off_is_a_slice_of_zeros(model: GPT) -> None:
    """Of the matrix behind it, what reads that head's output."""
    off = {(0, 1), (1, 0)}
    logits, inside = looked(model, off)
    usual, _ = looked(model)
    assert np.abs(np.array(logits - usual)).max() > 1e-3
    before = [block.attn.c_proj.weight for block in model.h]
    D = model.config.n_embd // model.config.n_head
    for layer, head in off:
        zeros = mx.array(model.h[layer].attn.c_proj.weight)
        zeros[:, head * D : (head + 1) * D] = 0
        model.h[layer].attn.c_proj.weight = zeros
    same, _ = model.prefill(mx.array(IDS), LAST)
    for block, weight in zip(model.h, before, strict=True):
        block.attn.c_proj.weight = weight
    np.testing.assert_allclose(logits, same, atol=1e-5)
    np.testing.assert_allclose(looked(model)[0], usual)
    assert [w.shape for w in inside.attention] == [(1, 2, 7, 7)] * 2, "still seen"


@pytest.mark.slow
def test_of_a_model_as_large_as_gpt2() -> None:
    config = override(
        config_files.load(config_files.built_in()["gpt2-124m"]), {"vocab_size": 50257}
    )
    model = GPT(config.model)
    ids = mx.random.randint(0, 50257, (1, 128))
    inside, last = Inside({(11, 3)}), mx.array([127])
    logits, _ = model.prefill(ids, last, inside)
    assert len(inside.attention) == 12
    for weights in inside.attention:
        assert weights.shape == (1, 12, 128, 128)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(model.lens(inside.residual[-1][:, -1]), logits, atol=1e-4)
