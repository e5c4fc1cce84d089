"""Losses of training with a frozen output head."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.config import LoRAConfig, ModelConfig
from mlxgpt.model import losses
from mlxgpt.model.gpt import GPT
from mlxgpt.model.lora import add_lora
from mlxgpt.model.losses import token_losses, training_losses
from mlxgpt.model.parameters import flatten_params
from tests.helpers.training_runs import MODERN_PARTS


@pytest.mark.parametrize("parts", [{}, MODERN_PARTS], ids=["classic", "racing"])
@pytest.mark.parametrize("chunk_logits", [40, 7 * 40, 1 << 20])
@pytest.mark.parametrize("compiled", [False, True])
def test_losses_and_gradients_in_chunks_are_those_of_the_logits(
    monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any], chunk_logits: int, compiled: bool
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk_logits)
    shape: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 8}
    model = GPT(ModelConfig(**shape, vocab_size=40, dropout=0.1, **parts))
    add_lora(model, LoRAConfig(lora_rank=4))
    noise = mx.random.normal(model.h[1].attn.c_attn.lora_b.shape, key=mx.random.key(0))
    model.h[1].attn.c_attn.lora_b = noise
    mx.eval(model.parameters())
    ids = mx.array(np.random.default_rng(0).integers(0, 40, (3, 9)))
    inputs, targets, key = ids[:, :-1], ids[:, 1:], mx.random.key(1)
    weights = mx.random.uniform(shape=targets.shape, key=mx.random.key(2))
    parameters = model.trainable_parameters()
    results = []
    for compute_losses in (
        lambda: training_losses(model, inputs, targets, key),
        lambda: token_losses(model(inputs, key=key), targets),
    ):

        def loss(parameters: dict, compute_losses: Any = compute_losses) -> mx.array:
            model.update(parameters)
            return (compute_losses() * weights).sum()

        function = mx.value_and_grad(loss)
        results.append((mx.compile(function) if compiled else function)(parameters))
        mx.eval(results)
        model.update(parameters)
    (value, tree), (expected, expected_tree) = results
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    gradients = flatten_params(tree)
    for name, gradient in flatten_params(expected_tree).items():
        difference = mx.abs(gradients[name] - gradient).max()
        assert float(difference) <= 1e-5 * float(mx.abs(gradient).max()) + 1e-7, name
    assert max(float(mx.abs(gradient).max()) for gradient in gradients.values()) > 0.1
