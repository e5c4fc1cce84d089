"""A model of modern parts beside transformers' Qwen3, which has the same: RMSNorm, rotary
positions, normalised queries and keys, SwiGLU, no biases, a tied head. Needs PyTorch and
transformers.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxgpt.config import Config, ModelConfig, override
from mlxgpt.model.gpt import GPT, flat, mlp_width
from mlxgpt.training.step import TrainStep

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHAPE = ModelConfig(
    n_layer=3,
    n_head=2,
    n_embd=32,
    block_size=24,
    vocab_size=50,
    dropout=0.0,
    bias=False,
    position="rope",
    norm="rms",
    qk_norm=True,
    mlp="swiglu",
)


def ours() -> GPT:
    """Large weights, so that every part matters."""
    model = GPT(SHAPE, 1)
    draw = np.random.default_rng(0)

    def random(p: mx.array) -> mx.array:
        return mx.array(draw.normal(float(p.ndim == 1), 0.2, p.shape).astype(np.float32))

    model.update(tree_map(random, model.parameters()))
    return model


def qwens_names(values: dict[str, mx.array]) -> dict[str, Any]:
    """Our arrays under Qwen3's names; gains of 1 where we have none."""
    found: dict[str, Any] = {
        "model.embed_tokens.weight": values["wte.weight"],
        "model.norm.weight": values["ln_f.weight"],
        "lm_head.weight": values["wte.weight"],
    }
    ones = mx.ones(SHAPE.n_embd)
    for n in range(SHAPE.n_layer):
        here, there = f"h.{n}", f"model.layers.{n}"
        for name, part in zip(
            "qkv", mx.split(values[f"{here}.attn.c_attn.weight"], 3), strict=True
        ):
            found[f"{there}.self_attn.{name}_proj.weight"] = part
        for name in "qk":
            found[f"{there}.self_attn.{name}_norm.weight"] = mx.ones(SHAPE.n_embd // SHAPE.n_head)
        gate, up = mx.split(values[f"{here}.mlp.c_fc.weight"], 2)
        found |= {
            f"{there}.self_attn.o_proj.weight": values[f"{here}.attn.c_proj.weight"],
            f"{there}.mlp.gate_proj.weight": gate,
            f"{there}.mlp.up_proj.weight": up,
            f"{there}.mlp.down_proj.weight": values[f"{here}.mlp.c_proj.weight"],
            f"{there}.input_layernorm.weight": ones,
            f"{there}.post_attention_layernorm.weight": ones,
        }
    return {name: torch.tensor(np.array(value)) for name, value in found.items()}


def theirs(values: dict[str, mx.array]) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.n_embd,
        intermediate_size=mlp_width(SHAPE),
        num_hidden_layers=SHAPE.n_layer,
        num_attention_heads=SHAPE.n_head,
        num_key_value_heads=SHAPE.n_head,
        head_dim=SHAPE.n_embd // SHAPE.n_head,
        max_position_embeddings=SHAPE.block_size,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        attention_dropout=0.0,
    )
    model = transformers.Qwen3ForCausalLM(config).float()
    model.load_state_dict(qwens_names(values))
    return model


def test_logits_loss_and_gradients_are_those_of_transformers() -> None:
    model = ours()
    other = theirs(flat(model.parameters()))
    ids = np.random.default_rng(1).integers(0, 50, (2, SHAPE.block_size + 1))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    result = other(torch.tensor(inputs)).logits
    np.testing.assert_allclose(model(mx.array(inputs)), result.detach(), atol=1e-4)

    config = override(Config(model=SHAPE), {"dtype": "float32"})
    loss, gradients = TrainStep(model, config).gradients(
        mx.array(inputs)[None], mx.array(targets)[None], mx.random.key(0)
    )
    expected = torch.nn.functional.cross_entropy(
        result.reshape(-1, 50), torch.tensor(targets).reshape(-1)
    )
    assert float(loss) == pytest.approx(float(expected.detach()), abs=1e-5)
    expected.backward()
    names = qwens_names(flat(gradients))
    own = {name: p.grad for name, p in other.named_parameters()}
    compared = [name for name in own if "norm" not in name or name == "model.norm.weight"]
    assert len(compared) == 2 + 7 * SHAPE.n_layer
    for name in compared:
        np.testing.assert_allclose(names[name], own[name], atol=1e-4, err_msg=name)
