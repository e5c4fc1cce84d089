"""A model of modern parts in the layout of Qwen3, which transformers, mlx-lm and llama.cpp have.

It holds rotary positions, RMS norms, normalised queries and keys, SwiGLU, a head tied or not, and
no biases. It has gains in every norm, which are 1 where ours have none; and a normalised embedding
is a table of normalised rows there. It does not hold: a squared ReLU, layer norms, learned
positions, value embeddings.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxgpt.backend.ops import NORM_EPS, rms_norm
from mlxgpt.config import ModelConfig
from mlxgpt.model.gpt import ROPE_BASE
from mlxgpt.model.stats import mlp_width

QWEN3_REQUIREMENTS = {
    "position": "rope",
    "norm": "rms",
    "qk_norm": True,
    "mlp": "swiglu",
    "bias": False,
    "value_embeddings": False,
}
EMBED_TOKENS, FINAL_NORM, LM_HEAD = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
)


def find_incompatible_settings(config: ModelConfig) -> dict[str, Any]:
    """The settings in which a model's parts are not Qwen3's."""
    return {
        name: value
        for name in QWEN3_REQUIREMENTS
        if (value := getattr(config, name)) != QWEN3_REQUIREMENTS[name]
    }


def make_qwen3_config(config: ModelConfig, bos: int | None) -> dict[str, Any]:
    """config.json as transformers and mlx-lm read it."""
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
    """Whether the output layer is other than the table of embeddings that Qwen3 has."""
    return not config.tied or config.embedding_norm


def convert_to_qwen3(config: ModelConfig, parameters: dict[str, mx.array]) -> dict[str, mx.array]:
    """The parameters by transformers' names; no head where it is the embedding."""
    wte = parameters["wte.weight"]
    converted = {
        EMBED_TOKENS: rms_norm(wte) if config.embedding_norm else wte,
        FINAL_NORM: parameters["ln_f.weight"],
    }
    if has_untied_head(config):
        converted[LM_HEAD] = wte if config.tied else parameters["lm_head.weight"]
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
