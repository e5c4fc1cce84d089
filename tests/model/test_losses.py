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
from mlxgpt.model.losses import (
    answer_logprobs,
    dpo_losses,
    make_kl_step,
    make_logprob_step,
    token_losses,
    training_losses,
)
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


def test_dpo_loss_is_that_of_the_paper() -> None:
    """Equation 7 of Rafailov et al., and its gradient: -beta σ(-margin) for the chosen answer."""
    draw = np.random.default_rng(0)
    logprobs, reference = draw.normal(-20, 5, (2, 50, 2))
    margins = 0.3 * ((logprobs - reference)[:, 0] - (logprobs - reference)[:, 1])
    losses_of = lambda x: dpo_losses(x, mx.array(reference), 0.3)  # noqa: E731
    values = np.array(losses_of(mx.array(logprobs)))
    np.testing.assert_allclose(values, np.log(1 + np.exp(-margins)), rtol=1e-4, atol=1e-6)
    gradient = np.array(mx.grad(lambda x: losses_of(x).sum())(mx.array(logprobs)))
    expected = 0.3 / (1 + np.exp(margins))
    np.testing.assert_allclose(gradient, np.stack([-expected, expected], axis=1), rtol=1e-3)
    same = dpo_losses(mx.array(reference), mx.array(reference), 0.3)
    np.testing.assert_allclose(np.array(same), np.log(2), rtol=1e-6)


def test_extreme_margins_give_finite_losses() -> None:
    logprobs = mx.array([[-1e4, -1.0], [-1.0, -1e4]])
    values = np.array(dpo_losses(logprobs, mx.zeros((2, 2)), 1.0))
    np.testing.assert_allclose(values, [9999.0, 0.0])


def test_divergence_and_log_probabilities_of_answers() -> None:
    shape: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8}
    model, other = (GPT(ModelConfig(**shape, vocab_size=20), seed) for seed in (1, 2))
    for gpt in (model, other):
        gpt.wte.weight = 30 * gpt.wte.weight  # not nearly uniform
    ids = mx.array(np.random.default_rng(0).integers(0, 20, (3, 9)))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    mask = mx.array(np.random.default_rng(1).integers(0, 2, targets.shape).astype(np.float32))
    arguments = inputs, targets, mask
    logits = [np.array(gpt(inputs)).astype(np.float64) for gpt in (model, other)]
    p, q = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in logits)
    expected = ((p * np.log(p / q)).sum(axis=-1) * np.array(mask)).sum(axis=-1)
    logprobs, divergence = make_kl_step(model, mx.float32)(
        model.parameters(), other.parameters(), *arguments
    )
    np.testing.assert_allclose(np.array(divergence), expected, rtol=1e-3)
    assert expected.sum() > 1
    alone = make_logprob_step(model, mx.float32)(model.parameters(), *arguments)
    direct = answer_logprobs(token_losses(model(inputs), targets), mask)
    np.testing.assert_allclose(np.array(alone[0]), np.array(direct), rtol=1e-5)
    np.testing.assert_allclose(np.array(logprobs), np.array(direct), rtol=1e-5)
    same = make_kl_step(model, mx.float32)(model.parameters(), model.parameters(), *arguments)
    np.testing.assert_allclose(np.array(same[1]), 0, atol=1e-6)
