"""Number of parameters and FLOPs of a GPT, from its config. C: n_embd, T: block_size."""

from __future__ import annotations

from mlxgpt.config import ModelConfig


def mlp_width(config: ModelConfig) -> int:
    """Width of the MLP's hidden layer: 4·C, or about 8/3·C for SwiGLU."""
    if config.mlp != "swiglu":
        return 4 * config.n_embd
    return max(1, round(8 * config.n_embd / 3 / 32)) * 32


def count_parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part, in order of the forward pass; a tied output head adds none."""
    C, layers, bias = config.n_embd, config.n_layer, int(config.bias)
    embedding_params = config.vocab_size * C
    hidden_size = mlp_width(config)
    c_fc_size = hidden_size * (2 if config.mlp == "swiglu" else 1)
    norm_params = C if config.norm == "rms" else (2 * layers + 1) * (1 + bias) * C
    parts = {
        f"wte (token embedding{', and head' if config.tied else ''})": embedding_params,
        "wpe (positions)": config.block_size * C * (config.position == "learned"),
        f"wve (value embeddings), {layers} ×": embedding_params * layers * config.value_embeddings,
        f"attention, {layers} ×": layers * (4 * C**2 + bias * 4 * C),
        f"MLP, {layers} ×": layers * ((c_fc_size + hidden_size) * C + bias * (c_fc_size + C)),
        "norms": norm_params,
        "lm_head": embedding_params * (not config.tied),
    }
    return {name: count for name, count in parts.items() if count}


def count_parameters(config: ModelConfig) -> int:
    """Total number of parameters."""
    return sum(count_parameters_by_part(config).values())


def flops_per_token(config: ModelConfig) -> int:
    """Training FLOPs per token, forward and backward: 6 per parameter of a matrix product, plus
    12·n_layer·C·T for attention (PaLM, Chowdhery et al., 2022, appendix B).
    """
    is_matmul = {"wpe": False, "wve": False, "wte": config.tied}  # False: only looked up
    matmul_params = sum(
        count
        for part, count in count_parameters_by_part(config).items()
        if is_matmul.get(part[:3], True)
    )
    return 6 * matmul_params + 12 * config.n_layer * config.n_embd * config.block_size


def min_training_bytes(model: ModelConfig) -> int:
    """Minimum training memory in bytes: weights, gradients and AdamW's two moments, in float32."""
    return 16 * count_parameters(model)
