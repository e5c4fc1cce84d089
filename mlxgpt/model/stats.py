"""Number of parameters and FLOPs of a GPT, from its config. C: n_embd, T: block_size."""

from __future__ import annotations

from mlxgpt.config import Config, ModelConfig


def mlp_width(config: ModelConfig) -> int:
    """Width of the MLP's hidden layer: 4·C, or about 8/3·C for SwiGLU."""
    if config.mlp != "swiglu":
        return 4 * config.n_embd
    return max(1, round(8 * config.n_embd / 3 / 32)) * 32


# Input channels of the gates of smear and value embeddings, as in nanochat.
SMEAR_CHANNELS, VALUE_GATE_CHANNELS = 24, 12


def find_value_layers(config: ModelConfig) -> list[int]:
    """Layers with value embeddings: all, or with gates every second one, the last included."""
    if not config.value_embeddings:
        return []
    step = 2 if config.value_gate else 1
    return list(range((config.n_layer - 1) % step, config.n_layer, step))


def count_parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part, in order of the forward pass; a tied output head adds none."""
    C, layers, bias = config.n_embd, config.n_layer, int(config.bias)
    embedding_params = config.vocab_size * C
    value_layers = len(find_value_layers(config))
    hidden_size = mlp_width(config)
    c_fc_size = hidden_size * (2 if config.mlp == "swiglu" else 1)
    norm_params = C if config.norm == "rms" else (2 * layers + 1) * (1 + bias) * C
    parts = {
        f"wte (token embedding{', and head' if config.tied else ''})": embedding_params,
        "wpe (positions)": config.block_size * C * (config.position == "learned"),
        f"wve (value embeddings), {value_layers} ×": embedding_params * value_layers,
        "smear": min(SMEAR_CHANNELS, C) * (config.smear + layers * config.token_shift),
        "value gates": value_layers
        * min(VALUE_GATE_CHANNELS, C)
        * config.n_head
        * config.value_gate,
        f"attention, {layers} ×": layers * (4 * C**2 + bias * 4 * C),
        f"MLP, {layers} ×": layers * ((c_fc_size + hidden_size) * C + bias * (c_fc_size + C)),
        "norms": norm_params,
        "lm_head": embedding_params * (not config.tied),
    }
    return {name: count for name, count in parts.items() if count}


def count_parameters(config: ModelConfig) -> int:
    """Total number of parameters."""
    return sum(count_parameters_by_part(config).values())


def count_trained_parameters(config: Config) -> int:
    """Number of trained parameters: all, or LoRA's adapters, without rows of new tokens."""
    m, lora = config.model, config.lora
    if not lora.lora_rank:
        return count_parameters(m)
    C, hidden_size = m.n_embd, mlp_width(m)
    c_fc_size = hidden_size * (2 if m.mlp == "swiglu" else 1)
    sizes = [(C, 3 * C), (C, C), (C, c_fc_size), (hidden_size, C)]  # (input, output)
    per_block = sum(lora.lora_rank * (i + o) + o * lora.dora for i, o in sizes)
    return len(lora.adapted_blocks(m.n_layer)) * per_block


def flops_per_token(config: ModelConfig) -> int:
    """Training FLOPs per token, forward and backward: 6 per parameter of a matrix product, plus
    12·n_layer·C·T for attention (PaLM, Chowdhery et al., 2022, appendix B).
    """
    attention_flops = 12 * config.n_layer * config.n_embd * config.block_size
    return 6 * _count_matmul_parameters(config) + attention_flops


def training_flops_per_token(config: Config) -> int:
    """FLOPs per token of a training run. A weight that LoRA freezes needs 4 instead of 6: there is
    no gradient with respect to it.
    """
    flops = flops_per_token(config.model)
    if not config.lora.lora_rank:
        return flops
    return flops - 2 * _count_matmul_parameters(config.model) + 6 * count_trained_parameters(config)


def _count_matmul_parameters(config: ModelConfig) -> int:
    is_matmul = {"wpe": False, "wve": False, "wte": config.tied}  # False: only looked up
    return sum(
        count
        for part, count in count_parameters_by_part(config).items()
        if is_matmul.get(part[:3], True)
    )


def min_training_bytes(config: Config) -> int:
    """Minimum training memory in bytes: weights, and gradients and AdamW's two moments of the
    trained ones, in float32.
    """
    return 4 * count_parameters(config.model) + 12 * count_trained_parameters(config)
