"""LoRA and DoRA: what is trained, and what the model computes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.config import Config, LoRAConfig, ModelConfig, override_config
from mlxgpt.data.token_array import Batch
from mlxgpt.model.gpt import GPT
from mlxgpt.model.lora import add_lora, fuse_adapters
from mlxgpt.model.parameters import flatten_params
from mlxgpt.model.stats import count_trained_parameters
from mlxgpt.training.step import make_train_step
from mlxgpt.utils.errors import UserError
from tests.helpers.training_runs import MODERN_PARTS, QWEN3_PARTS

CLASSIC: dict[str, Any] = {}
PARTS = {"classic": CLASSIC, "qwen3": QWEN3_PARTS, "racing": MODERN_PARTS}
IDS = mx.array(np.random.default_rng(0).integers(0, 40, (2, 8)))


@pytest.fixture(params=PARTS)
def shape(request: pytest.FixtureRequest) -> ModelConfig:
    sizes: dict[str, Any] = {
        "n_layer": 3,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 8,
        "vocab_size": 40,
    }
    return ModelConfig(**sizes, **PARTS[request.param])


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def lora(request: pytest.FixtureRequest) -> LoRAConfig:
    return LoRAConfig(lora_rank=4, lora_alpha=6.0, lora_layers=2, dora=request.param)


def randomize(model: GPT) -> None:
    """Give all trained arrays other values."""
    for n, (name, value) in enumerate(flatten_params(model.trainable_parameters()).items()):
        noise = 0.3 * mx.random.normal(value.shape, key=mx.random.key(n))
        model.load_weights([(name, value + noise)], strict=False)


def test_at_first_the_adapters_change_no_bit(shape: ModelConfig, lora: LoRAConfig) -> None:
    expected = GPT(shape)(IDS)
    model = GPT(shape)
    add_lora(model, lora)
    np.testing.assert_array_equal(np.array(model(IDS)), np.array(expected))
    # The logits of new tokens are another matrix product, which may round differently.
    model = GPT(shape)
    add_lora(model, lora, new_tokens=range(37, 39))
    np.testing.assert_allclose(np.array(model(IDS)), np.array(expected), atol=1e-6)


def test_only_adapters_of_the_last_blocks_and_rows_of_new_tokens_are_trained(
    shape: ModelConfig, lora: LoRAConfig
) -> None:
    model = GPT(shape)
    frozen = flatten_params(model.parameters())
    add_lora(model, lora)
    trained = flatten_params(model.trainable_parameters())
    assert {name.split(".")[1] for name in trained} == {"1", "2"}
    kinds = {"lora_a", "lora_b"} | ({"m"} if lora.dora else set())
    assert {name.rpartition(".")[2] for name in trained} == kinds
    assert len(trained) == 2 * 4 * len(kinds)
    assert flatten_params(model.parameters()).keys() == frozen.keys() | trained.keys()
    count = sum(value.size for value in trained.values())
    assert count == count_trained_parameters(Config(model=shape, lora=lora))

    model = GPT(shape)
    add_lora(model, lora, new_tokens=range(37, 39))
    rows = {n: v for n, v in flatten_params(model.trainable_parameters()).items() if "row" in n}
    tables = {n for n in frozen if n in ("wte.weight", "lm_head.weight") or n.startswith("wve.")}
    assert {n.replace("new_rows", "weight") for n in rows} == tables
    assert {value.shape for value in rows.values()} == {(2, 32)}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_changes_no_frozen_weight(tiny_model: Config, dtype: str, dora: bool) -> None:
    settings = {"lora_rank": 4, "dora": dora, "dtype": dtype, "dropout": 0.0}
    config = override_config(tiny_model, settings)
    step = make_train_step(config)
    before = {n: mx.array(v) for n, v in flatten_params(step.model.parameters()).items()}
    T, V = config.model.block_size, config.model.vocab_size
    ids = np.random.default_rng(0).integers(0, V, (1, 2, T + 1))
    batch = Batch(mx.array(ids[..., :-1]), mx.array(ids[..., 1:]), None)
    losses = [float(step(batch, mx.array(0.02), mx.random.key(0))[0]) for _ in range(5)]
    assert losses[-1] < losses[0]
    for name, value in flatten_params(step.model.parameters()).items():
        is_trained = name.endswith((".lora_a", ".lora_b", ".m"))
        assert value.dtype == (mx.float32 if is_trained else getattr(mx, dtype)), name
        assert mx.array_equal(value, before[name]) != is_trained, name
    parameters, optimizer = step.state_dicts()
    assert all(name.endswith((".lora_a", ".lora_b", ".m")) for name in parameters)
    assert not any("weight" in name for name in optimizer)


def test_fused_weights_compute_the_same(shape: ModelConfig, lora: LoRAConfig) -> None:
    new_tokens = range(36, 39)
    adapted = GPT(shape)
    add_lora(adapted, lora, new_tokens=new_tokens)
    randomize(adapted)
    fused = GPT(shape)
    before = np.array(fused(IDS))
    fuse_adapters(fused, lora, flatten_params(adapted.trainable_parameters()), new_tokens)
    expected = np.array(adapted(IDS))
    assert abs(expected - before).max() > 0.1
    np.testing.assert_allclose(np.array(fused(IDS)), expected, atol=2e-5)
    assert (
        flatten_params(fused.parameters()).keys() == flatten_params(GPT(shape).parameters()).keys()
    )


def test_dora_keeps_the_trained_norms(shape: ModelConfig) -> None:
    """Whatever a and b are, row o of the fused weight has norm m[o]."""
    lora = LoRAConfig(lora_rank=4, dora=True)
    adapted = GPT(shape)
    add_lora(adapted, lora)
    randomize(adapted)
    adapters = flatten_params(adapted.trainable_parameters())
    fused = GPT(shape)
    fuse_adapters(fused, lora, adapters)
    weight = np.array(fused.h[1].mlp.c_fc.weight)
    norms = np.linalg.norm(weight, axis=1)
    np.testing.assert_allclose(norms, abs(np.array(adapters["h.1.mlp.c_fc.m"])), rtol=1e-5)


def test_adapters_of_another_shape_are_rejected(shape: ModelConfig, lora: LoRAConfig) -> None:
    model = GPT(shape)
    add_lora(model, lora)
    adapters = flatten_params(model.trainable_parameters())
    del adapters["h.1.attn.c_attn.lora_a"]
    with pytest.raises(UserError, match="do not match"):
        fuse_adapters(GPT(shape), lora, adapters)


@pytest.mark.parametrize("changed", [None, "lora_b", "m", "new_rows"])
def test_fusing_tells_whether_a_weight_changed(shape: ModelConfig, changed: str | None) -> None:
    lora, new_tokens = LoRAConfig(lora_rank=4, dora=True), range(36, 39)
    adapted = GPT(shape)
    add_lora(adapted, lora, new_tokens=new_tokens)
    adapters = {
        name: value + 1 if changed and name.endswith(changed) else value
        for name, value in flatten_params(adapted.trainable_parameters()).items()
    }
    assert fuse_adapters(GPT(shape), lora, adapters, new_tokens) == (changed is not None)
