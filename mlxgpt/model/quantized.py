"""A model in fewer bits: what generates from it reads less memory for each token, on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxgpt.backend.execution import compiled
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import token_losses
from mlxgpt.utils.errors import UserError

BITS = (16, 8, 4)
GROUPS = (64, 32)  # numbers of a row that share a scale and an offset; mlx-lm's own choice first


def quantize(model: GPT, bits: int) -> None:
    """Round a model's weights: all to bfloat16, or its matrices and its head to 8 or 4 bits a
    number, as mlx-lm does. A matrix whose rows no group divides stays as it is.

    Raises:
        UserError: if that holds for every matrix.
    """
    if bits == 16:
        model.update(tree_map(lambda p: p.astype(mx.bfloat16), model.parameters()))
        return
    done: list[str] = []

    def settings(name: str, module: nn.Module) -> bool | dict[str, int]:
        if not isinstance(module, nn.Linear) and (name != "wte" or not model.config.tied):
            return False
        group = next((g for g in GROUPS if module.weight.shape[-1] % g == 0), None)
        if group is None:
            return False
        done.append(name)
        return {"group_size": group, "bits": bits}

    nn.quantize(model, class_predicate=settings)
    if not done:
        raise UserError(
            f"rows of {model.config.n_embd} numbers cannot be shared out in groups of {GROUPS[-1]}",
            "leave out --quantize, or use --quantize 16.",
        )


def as_it_is(model: GPT) -> Callable[..., mx.array]:
    """As `losses.make_eval_step`, of a model whose weights do not change, in whatever numbers they
    are.
    """

    @compiled
    def losses(inputs: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
        return (token_losses(model(inputs), targets) * mask).sum()

    return lambda _, *batch: losses(*batch)
