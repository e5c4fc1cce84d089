"""Conversion to the layout of Qwen3, which transformers, mlx-lm and llama.cpp load.

Qwen3 has RoPE, RMSNorm, QK norm, SwiGLU, a tied or untied output head, and no biases. Gains of all
norms but the last are 1, as ours have none. With `embedding_norm`, the embedding is normalized.
Squared ReLU, LayerNorm, learned positions and value embeddings are not supported.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxgpt.backend.ops import NORM_EPS, rms_norm
from mlxgpt.config import ModelConfig
from mlxgpt.convert.huggingface import LM_HEAD
from mlxgpt.model.rope import ROPE_BASE
from mlxgpt.model.stats import mlp_width

# Values in ModelConfig that Qwen3's layout requires.
QWEN3_REQUIREMENTS = {
    "position": "rope",
    "norm": "rms",
    "qk_norm": True,
    "mlp": "swiglu",
    "bias": False,
    "value_embeddings": False,
    "smear": False,
    "token_shift": False,
}


def find_incompatible_settings(config: ModelConfig) -> dict[str, Any]:
    """Settings in a model config that Qwen3's layout does not support, with their values."""
    return {
        name: value
        for name in QWEN3_REQUIREMENTS
        if (value := getattr(config, name)) != QWEN3_REQUIREMENTS[name]
    }


def differs_from_gpt2(config: ModelConfig) -> bool:
    """Whether a model's architecture differs from GPT-2's."""
    gpt2_config = ModelConfig()
    parts = (QWEN3_REQUIREMENTS.keys() | {"tied", "embedding_norm"}) - {"bias"}
    return any(getattr(config, name) != getattr(gpt2_config, name) for name in parts)


def make_qwen3_config(config: ModelConfig, bos: int | None) -> dict[str, Any]:
    """Content of config.json for transformers and mlx-lm; `bos` is both BOS and EOS."""
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": mlp_width(config),
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "head_dim": config.n_embd // config.n_head,
        "max_position_embeddings": config.block_size,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_BASE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": not has_untied_head(config),
        "bos_token_id": bos,
        "eos_token_id": bos,
        "torch_dtype": "float32",
    }


def has_untied_head(config: ModelConfig) -> bool:
    """Whether the exported model needs an output head separate from its token embedding."""
    return not config.tied or config.embedding_norm


EMBED_TOKENS, FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"


def convert_to_qwen3(config: ModelConfig, parameters: dict[str, mx.array]) -> dict[str, mx.array]:
    """Convert parameters to transformers' names and layout; a tied output head is left out."""
    wte = parameters["wte.weight"]
    converted = {
        EMBED_TOKENS: rms_norm(wte) if config.embedding_norm else wte,
        FINAL_NORM: parameters["ln_f.weight"],
    }
    if has_untied_head(config):
        converted[LM_HEAD] = wte if config.tied else parameters[LM_HEAD]
    norm_gain, qk_norm_gain = mx.ones(config.n_embd), mx.ones(config.n_embd // config.n_head)
    for n in range(config.n_layer):
        gpt_prefix, qwen_prefix = f"h.{n}", f"model.layers.{n}"
        q, k, v = mx.split(parameters[f"{gpt_prefix}.attn.c_attn.weight"], 3)
        gate, up = mx.split(parameters[f"{gpt_prefix}.mlp.c_fc.weight"], 2)
        parts = {
            "input_layernorm": norm_gain,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.q_norm": qk_norm_gain,
            "self_attn.k_norm": qk_norm_gain,
            "self_attn.o_proj": parameters[f"{gpt_prefix}.attn.c_proj.weight"],
            "post_attention_layernorm": norm_gain,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": parameters[f"{gpt_prefix}.mlp.c_proj.weight"],
        }
        converted |= {
            f"{qwen_prefix}.{name}.weight": mx.contiguous(part) for name, part in parts.items()
        }
    return converted
