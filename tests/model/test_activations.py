from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.backend import ops
from mlxgpt.config import Config, override_config, toml
from mlxgpt.model.activations import ActivationRecorder
from mlxgpt.model.gpt import GPT
from mlxgpt.model.kv_cache import KVCache
from tests.helpers.tiny_models import make_random_model
from tests.helpers.training_runs import MODERN_PARTS

IDS = np.array([[3, 1, 4, 1, 5, 9, 2]])
LAST = mx.array([IDS.shape[1] - 1])


@pytest.fixture(scope="module", params=["classic", "modern"])
def model(request: pytest.FixtureRequest, tiny_model: Config) -> GPT:
    parts = MODERN_PARTS if request.param == "modern" else {}
    return make_random_model(override_config(tiny_model, parts))


def record_pass(model: GPT, off_heads: Any = ()) -> tuple[mx.array, ActivationRecorder]:
    recorder = ActivationRecorder(off_heads)
    return model(mx.array(IDS), KVCache(), last=LAST, recorder=recorder), recorder


def test_recorded_attention_matches_the_forward_pass(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows sum to 1, the weights are causal, and weights @ v is the output of attention."""
    original, calls = ops.causal_attention, []

    def recording_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        calls.append((v, original(q, k, v)))
        return calls[-1][1]

    monkeypatch.setattr(ops, "causal_attention", recording_attention)
    _, recorder = record_pass(model)
    assert len(recorder.attention) == len(calls) == len(model.h)
    for weights, (v, y) in zip(recorder.attention, calls, strict=True):
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
        np.testing.assert_array_equal(weights, mx.tril(weights))
        np.testing.assert_allclose(weights @ v, y, atol=1e-5)
        assert np.abs(np.array(weights[0, 0] - weights[0, 1])).max() > 1e-3, "heads differ"


def test_logits_from_the_last_residual_match_the_model(model: GPT) -> None:
    logits, recorder = record_pass(model)
    assert len(recorder.residual) == len(model.h) + 1
    np.testing.assert_allclose(
        model.compute_logits(recorder.residual[-1]), model(mx.array(IDS)), atol=1e-5
    )
    np.testing.assert_array_equal(recorder.residual[0], _embed(model))
    np.testing.assert_allclose(
        model.compute_logits(recorder.residual[-1][:, -1]), logits, atol=1e-5
    )


def _embed(model: GPT) -> mx.array:
    x = model.wte(mx.array(IDS))
    if model.config.embedding_norm:
        x = ops.rms_norm(x)
    if model.config.smear:
        x = model.smear(x)
    return x + model.wpe.weight[: IDS.shape[1]] if "wpe" in model else x


def test_recording_does_not_change_the_logits(model: GPT) -> None:
    logits, _ = record_pass(model)
    expected = model(mx.array(IDS), KVCache(), last=LAST)
    np.testing.assert_array_equal(logits, expected)


def test_disabling_a_head_equals_zeroing_its_output_weights(model: GPT) -> None:
    """In c_proj, the input columns of that head."""
    off_heads = {(0, 1), (1, 0)}
    logits, recorder = record_pass(model, off_heads)
    unmodified, _ = record_pass(model)
    assert np.abs(np.array(logits - unmodified)).max() > 1e-3
    before = [block.attn.c_proj.weight for block in model.h]
    D = model.config.n_embd // model.config.n_head
    for layer, head in off_heads:
        zeros = mx.array(model.h[layer].attn.c_proj.weight)
        zeros[:, head * D : (head + 1) * D] = 0
        model.h[layer].attn.c_proj.weight = zeros
    zeroed = model(mx.array(IDS), KVCache(), last=LAST)
    for block, weight in zip(model.h, before, strict=True):
        block.attn.c_proj.weight = weight
    np.testing.assert_allclose(logits, zeroed, atol=1e-5)
    np.testing.assert_allclose(record_pass(model)[0], unmodified)
    assert [w.shape for w in recorder.attention] == [(1, 2, 7, 7)] * 2, "still seen"


@pytest.mark.slow
def test_recording_in_a_model_of_gpt2_size() -> None:
    config = override_config(
        toml.load_config(toml.find_builtin_configs()["gpt2-124m"]), {"vocab_size": 50257}
    )
    model = GPT(config.model)
    ids = mx.random.randint(0, 50257, (1, 128))
    recorder = ActivationRecorder({(11, 3)})
    logits = model(ids, KVCache(), last=mx.array([127]), recorder=recorder)
    assert len(recorder.attention) == 12
    for weights in recorder.attention:
        assert weights.shape == (1, 12, 128, 128)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(
        model.compute_logits(recorder.residual[-1][:, -1]), logits, atol=1e-4
    )
