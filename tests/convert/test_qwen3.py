"""The Qwen3 layout. tests/oracle checks that transformers, mlx-lm and llama.cpp can read it."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxgpt.config import Config, override_config, toml
from mlxgpt.convert import qwen3
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
from mlxgpt.model.stats import count_parameters


@pytest.fixture
def config(tiny_model: Config) -> Config:
    return override_config(tiny_model, dict(qwen3.QWEN3_REQUIREMENTS))


def test_every_parameter_is_converted_and_every_gain_is_present(config: Config) -> None:
    converted = qwen3.convert_to_qwen3(config.model, flatten_params(GPT(config.model).parameters()))
    gains = {n for n in converted if "norm" in n and n != qwen3.FINAL_NORM}
    assert len(gains) == 4 * config.model.n_layer
    assert all(bool((converted[name] == 1).all()) for name in gains)
    other_size = sum(value.size for name, value in converted.items() if name not in gains)
    assert other_size == count_parameters(config.model)


def test_untied_head_and_embedding_norm_are_converted(config: Config) -> None:
    shape = override_config(config, {"tied": False, "embedding_norm": True}).model
    parameters = flatten_params(GPT(shape).parameters())
    converted = qwen3.convert_to_qwen3(shape, parameters)
    assert converted[qwen3.LM_HEAD] is parameters["lm_head.weight"]
    sizes = mx.square(converted[qwen3.EMBED_TOKENS]).mean(axis=1)
    assert mx.allclose(sizes, mx.array(1.0), atol=0.1)
    assert qwen3.make_qwen3_config(shape, None)["tie_word_embeddings"] is False
    assert qwen3.make_qwen3_config(config.model, None)["tie_word_embeddings"] is True


def test_incompatible_settings_are_named(tiny_model: Config, config: Config) -> None:
    assert qwen3.find_incompatible_settings(config.model) == {}
    incompatible = {"mlp": "relu2", "bias": True, "value_embeddings": True}
    assert (
        qwen3.find_incompatible_settings(override_config(config, incompatible).model)
        == incompatible
    )


@pytest.mark.parametrize("tier", [1, 2])
def test_modern_recipe_is_compatible_and_racing_is_not(tier: int) -> None:
    assert qwen3.find_incompatible_settings(toml.load_tier_config(tier, "modern").model) == {}
    racing = qwen3.find_incompatible_settings(toml.load_tier_config(tier, "racing").model)
    assert racing.items() >= {"smear": True, "token_shift": True}.items()


def test_config_matches_the_shapes_of_the_arrays(config: Config) -> None:
    tree = qwen3.make_qwen3_config(config.model, 5)
    model, arrays = (
        config.model,
        qwen3.convert_to_qwen3(config.model, flatten_params(GPT(config.model).parameters())),
    )
    up = arrays["model.layers.0.mlp.up_proj.weight"]
    assert up.shape == (tree["intermediate_size"], tree["hidden_size"])
    assert tree["head_dim"] * tree["num_attention_heads"] == model.n_embd
    assert tree["bos_token_id"] == tree["eos_token_id"] == 5
    assert arrays["model.layers.1.self_attn.q_norm.weight"].shape == (tree["head_dim"],)
    assert mx.array_equal(
        arrays["model.layers.1.self_attn.k_proj.weight"],
        flatten_params(GPT(model).parameters())["h.1.attn.c_attn.weight"][16:32],
    )
