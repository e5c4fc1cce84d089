"""Quantized export of GPT-2 for mlx-lm, with a scale and an offset per group of a row's values.

Names have the prefix `model.`, and matrices are [out, in]. mlx-lm transposes the [in, out] matrices
of transformers when loading, which is not possible with packed ones.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlxgpt.backend.safetensors_io import save_arrays
from mlxgpt.config import ModelConfig
from mlxgpt.convert.huggingface import (
    LINEAR_WEIGHTS,
    WEIGHTS_FILE,
    add_zero_biases,
    write_gpt2_config,
)
from mlxgpt.utils.errors import UserError


def write_mlx_lm(
    folder: Path, config: ModelConfig, parameters: dict[str, mx.array], bos: int | None, bits: int
) -> None:
    """Write config.json and model.safetensors, with matrices and token embedding in 8 or 4 bits.

    Raises:
        UserError: if n_embd is not a multiple of any group size.
    """
    group_size = choose_group_size(config)
    settings = {"group_size": group_size, "bits": bits, "mode": "affine"}
    write_gpt2_config(folder, config, bos, quantization=settings, quantization_config=settings)
    arrays: dict[str, mx.array] = {}
    for name, value in add_zero_biases(config, parameters).items():
        prefix = f"model.{name.removesuffix('.weight')}"
        if should_quantize(name):
            packed, scales, biases = mx.quantize(value, group_size, bits)
            arrays |= {f"{prefix}.weight": packed}
            arrays |= {f"{prefix}.scales": scales, f"{prefix}.biases": biases}
        else:
            arrays[f"model.{name}"] = value
    save_arrays(folder / WEIGHTS_FILE, arrays, {"format": "mlx"})


def fake_quantize_mlx_lm(
    config: ModelConfig, parameters: dict[str, mx.array], bits: int
) -> dict[str, mx.array]:
    """Quantize and dequantize the parameters with mlx-lm's scheme."""
    group_size = choose_group_size(config)
    return {
        name: mx.dequantize(*mx.quantize(value, group_size, bits), group_size=group_size, bits=bits)
        if should_quantize(name)
        else value
        for name, value in parameters.items()
    }


def should_quantize(name: str) -> bool:
    """Whether a parameter is quantized; position embeddings, biases and norms stay float32."""
    return name == "wte.weight" or name.endswith(LINEAR_WEIGHTS)


GROUP_SIZES = (64, 32)  # values of a row that share a scale; mlx-lm's default first


def choose_group_size(config: ModelConfig) -> int:
    """The largest group size that divides n_embd; raises UserError if there is none."""
    for group_size in GROUP_SIZES:
        if config.n_embd % group_size == 0:
            return group_size
    raise UserError(
        f"n_embd = {config.n_embd} cannot be quantized: it is not a multiple of {GROUP_SIZES[-1]}",
        "omit --quantize, or train a model with such an --n-embd.",
    )
