"""Quantization of a model's weights, so that a GPU reads less memory for each token."""

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
# Values of a row that share a scale and an offset; mlx-lm's own choice first.
QUANTIZATION_GROUP_SIZES = (64, 32)


def quantize_model(model: GPT, bits: int) -> None:
    """Round a model's weights: all to bfloat16, or its matrices and its head to 8 or 4 bits, as
    mlx-lm does. A matrix whose rows no group size divides stays as it is.

    Raises:
        UserError: if that holds for every matrix.
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
    """`losses.make_eval_step` for a model with fixed weights, of any dtype or quantized."""

    @compile_function
    def eval_step(inputs: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
        return (token_losses(model(inputs), targets) * mask).sum()

    return lambda _, *batch: eval_step(*batch)
