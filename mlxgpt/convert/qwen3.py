"""Converts a model to the layout of Qwen3, which transformers, mlx-lm and llama.cpp load.

It supports rotary positions, RMS norms, normalized queries and keys, SwiGLU, a head tied or not,
and no biases. It has gains in every norm, which are 1 since ours have none; and a normalized
embedding becomes a table of normalized rows. It does not support a squared ReLU, layer norms,
learned positions and value embeddings.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxgpt.backend.ops import NORM_EPS, rms_norm
from mlxgpt.config import ModelConfig
from mlxgpt.convert.huggingface import LM_HEAD
from mlxgpt.model.gpt import ROPE_BASE
from mlxgpt.model.stats import mlp_width

# Settings of ModelConfig that Qwen3's layout supports.
QWEN3_REQUIREMENTS = {
    "position": "rope",
    "norm": "rms",
    "qk_norm": True,
    "mlp": "swiglu",
    "bias": False,
    "value_embeddings": False,
}


def find_incompatible_settings(config: ModelConfig) -> dict[str, Any]:
    """The settings of a model that Qwen3's layout does not support."""
    return {
        name: value
        for name in QWEN3_REQUIREMENTS
        if (value := getattr(config, name)) != QWEN3_REQUIREMENTS[name]
    }


def make_qwen3_config(config: ModelConfig, bos: int | None) -> dict[str, Any]:
    """The content of config.json, as transformers and mlx-lm read it."""
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
    """Whether the exported model needs an output head apart from its table of embeddings."""
    return not config.tied or config.embedding_norm


EMBED_TOKENS, FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"


def convert_to_qwen3(config: ModelConfig, parameters: dict[str, mx.array]) -> dict[str, mx.array]:
    """The parameters by transformers' names; no head where it is the embedding."""
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
