"""Initial weights of a new model, as in GPT-2."""

from __future__ import annotations

import math
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxgpt.model.parameters import flatten_params
from mlxgpt.utils.seeds import derive_seed

INIT_STD = 0.02  # standard deviation of weights, as in GPT-2


def init_parameters(model: nn.Module, seed: int, n_layer: int) -> dict[str, Any]:
    """GPT-2's initial weights: N(0, 0.02), residual projections scaled by 1/√(2·n_layer), biases 0,
    norms 1. All logits are then near 0, and the first loss is near ln V.
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
