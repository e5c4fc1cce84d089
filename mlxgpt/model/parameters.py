"""A model's parameters by their dotted names: initial values, comparison, loading."""

from __future__ import annotations

import math
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt.utils.errors import UserError
from mlxgpt.utils.seeds import derive_seed

VOCAB_MATRICES = ("wte.weight", "lm_head.weight")  # [V, C], a row for each token


def flatten_params(tree: Any) -> dict[str, mx.array]:
    """A tree's arrays by their dotted names, as `h.0.attn.c_attn.weight`."""
    return cast(dict[str, mx.array], tree_flatten(tree, destination={}))


INIT_STD = 0.02  # standard deviation of weights, as in GPT-2


def init_parameters(model: nn.Module, seed: int, n_layer: int) -> dict[str, Any]:
    """GPT-2's initial weights: N(0, 0.02), residual projections scaled by 1/√(2·n_layer), biases
    0, norms 1. They stay small, so that every logit is near 0 and the first loss near ln V.
    """
    parameters = flatten_params(model.parameters())
    keys = mx.random.split(mx.random.key(derive_seed(seed, "init")), len(parameters))
    residual_scale = 1 / math.sqrt(2 * n_layer)
    values = {}
    for (name, old), key in zip(parameters.items(), keys, strict=True):
        if old.ndim >= 2:
            std = INIT_STD * (residual_scale if name.endswith("c_proj.weight") else 1)
            new = std * mx.random.normal(old.shape, key=key)
        else:
            new = mx.zeros(old.shape) if name.endswith("bias") else mx.ones(old.shape)
        values[name] = new
    return cast(dict[str, Any], tree_unflatten(values))


def load_parameters(model: nn.Module, parameters: dict[str, mx.array]) -> None:
    """Replace a model's parameters by saved ones, keyed by their dotted names.

    Raises:
        UserError: if names, shapes or types are not this model's.
    """
    check_shapes(parameters, flatten_params(model.parameters()))
    model.update(tree_unflatten(parameters))


def check_shapes(arrays: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    """Refuse saved arrays whose names, shapes and types are not those of a model's own."""

    def shapes_and_dtypes(arrays: dict[str, mx.array]) -> dict[str, Any]:
        return {name: (value.shape, value.dtype) for name, value in arrays.items()}

    if shapes_and_dtypes(arrays) != shapes_and_dtypes(expected):
        raise UserError(
            "the weights are those of a model of another shape",
            "restore the run's own checkpoint; config.toml and checkpoints belong together.",
        )
