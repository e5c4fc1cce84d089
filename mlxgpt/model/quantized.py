"""Quantize a model's weights, so that a GPU reads less memory per token."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxgpt.backend.execution import compile_function
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import token_losses
from mlxgpt.utils.errors import UserError

QUANTIZATION_BITS = (16, 8, 4)
# Values of a row that share a scale and a bias; 64 is mlx-lm's default.
QUANTIZATION_GROUP_SIZES = (64, 32)


def quantize_model(model: GPT, bits: int) -> None:
    """Quantize a model in place: all weights to bfloat16 (16 bits), or linear layers and a tied
    embedding to 8 or 4 bits, as mlx-lm does. Matrices whose row size no group size divides are
    skipped.

    Raises:
        UserError: if no matrix can be quantized.
    """
    if bits == 16:
        model.update(tree_map(lambda p: p.astype(mx.bfloat16), model.parameters()))
        return
    quantized_names: list[str] = []

    def class_predicate(name: str, module: nn.Module) -> bool | dict[str, int]:
        if not isinstance(module, nn.Linear) and (name != "wte" or not model.config.tied):
            return False
        row_size = module.weight.shape[-1]
        group_size = next((size for size in QUANTIZATION_GROUP_SIZES if row_size % size == 0), None)
        if group_size is None:
            return False
        quantized_names.append(name)
        return {"group_size": group_size, "bits": bits}

    nn.quantize(model, class_predicate=class_predicate)
    if not quantized_names:
        raise UserError(
            f"n_embd = {model.config.n_embd} cannot be quantized: it is not a multiple of "
            f"{QUANTIZATION_GROUP_SIZES[-1]}",
            "omit --quantize, or use --quantize 16.",
        )


def make_frozen_eval_step(model: GPT) -> Callable[..., mx.array]:
    """Like `losses.make_eval_step`, for a model with fixed weights, of any dtype or quantized."""

    @compile_function
    def eval_step(inputs: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
        return (token_losses(model(inputs), targets) * mask).sum()

    return lambda _, *batch: eval_step(*batch)
