"""A quantized GPT-2 as mlx-lm keeps it: groups of a row's numbers share a scale and an offset.

Its names stand behind `model.`, and its matrices are [out, in]: what mlx-lm takes from files of
others it turns over, and what is packed cannot be turned.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlxgpt.backend.safetensors_io import save_arrays
from mlxgpt.config import ModelConfig
from mlxgpt.convert.huggingface import MATRICES, WEIGHTS, with_biases, write_config
from mlxgpt.utils.errors import UserError

GROUPS = (64, 32)  # numbers of a row that share a scale; mlx-lm's own choice first


def write(
    folder: Path, config: ModelConfig, parameters: dict[str, mx.array], bos: int | None, bits: int
) -> None:
    """Write config.json and model.safetensors, the matrices and the embedding in 8 or 4 bits.

    Raises:
        UserError: if no group divides the model's width.
    """
    group = group_of(config)
    settings = {"group_size": group, "bits": bits, "mode": "affine"}
    write_config(folder, config, bos, quantization=settings, quantization_config=settings)
    arrays: dict[str, mx.array] = {}
    for name, value in with_biases(config, parameters).items():
        place = f"model.{name.removesuffix('.weight')}"
        if is_quantized(name):
            packed, scales, biases = mx.quantize(value, group, bits)
            arrays |= {f"{place}.weight": packed}
            arrays |= {f"{place}.scales": scales, f"{place}.biases": biases}
        else:
            arrays[f"model.{name}"] = value
    save_arrays(folder / WEIGHTS, arrays, {"format": "mlx"})


def rounded(config: ModelConfig, parameters: dict[str, mx.array], bits: int) -> dict[str, mx.array]:
    """The parameters as they are once they were quantized."""
    group = group_of(config)
    return {
        name: mx.dequantize(*mx.quantize(value, group, bits), group_size=group, bits=bits)
        if is_quantized(name)
        else value
        for name, value in parameters.items()
    }


def is_quantized(name: str) -> bool:
    """Whether an array is one of those: positions, biases and norms stay as they are."""
    return name == "wte.weight" or name.endswith(MATRICES)


def group_of(config: ModelConfig) -> int:
    """The largest group that divides the model's width."""
    for group in GROUPS:
        if config.n_embd % group == 0:
            return group
    raise UserError(
        f"the width {config.n_embd} cannot be quantized: it is no multiple of {GROUPS[-1]}",
        "export it without --quantize; or train one with such an --n-embd.",
    )
