"""Flatten, check and load model parameters, keyed by their dotted names."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt.utils.errors import UserError

VOCAB_MATRICES = ("wte.weight", "lm_head.weight")  # [V, C], one row per token


def flatten_params(tree: Any) -> dict[str, mx.array]:
    """Flatten a parameter tree to dotted names such as `h.0.attn.c_attn.weight`."""
    return cast(dict[str, mx.array], tree_flatten(tree, destination={}))


def fit_positions(parameters: dict[str, mx.array], block_size: int) -> dict[str, mx.array]:
    """Keep the first `block_size` position embeddings, if there are any."""
    if "wpe.weight" not in parameters:
        return parameters
    return {**parameters, "wpe.weight": parameters["wpe.weight"][:block_size]}


def add_vocab_rows(parameters: dict[str, mx.array], new_tokens: range) -> dict[str, mx.array]:
    """Set the rows of new tokens in each matrix over the vocabulary to the mean of the rows before
    them (Hewitt, Initializing New Word Embeddings, 2021). Padding rows are used first.
    """
    parameters = dict(parameters)
    for name, table in parameters.items():
        if name in VOCAB_MATRICES or name.startswith("wve."):
            old_rows = table[: new_tokens.start]
            mean = old_rows.mean(axis=0, keepdims=True)
            new_rows = mx.broadcast_to(mean, (len(new_tokens), table.shape[1]))
            parameters[name] = mx.concatenate([old_rows, new_rows, table[new_tokens.stop :]])
    return parameters


def load_parameters(model: nn.Module, parameters: dict[str, mx.array]) -> None:
    """Load saved parameters, keyed by dotted names, into a model.

    Raises:
        UserError: if names, shapes or dtypes do not match the model's.
    """
    check_shapes(parameters, flatten_params(model.parameters()))
    model.update(tree_unflatten(parameters))


def check_shapes(arrays: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    """Raise UserError if the names, shapes or dtypes of saved arrays are not the expected ones."""

    def shapes_and_dtypes(arrays: dict[str, mx.array]) -> dict[str, Any]:
        return {name: (value.shape, value.dtype) for name, value in arrays.items()}

    if shapes_and_dtypes(arrays) != shapes_and_dtypes(expected):
        raise UserError(
            "the weights do not match the architecture in config.toml",
            "restore the run's original config.toml and checkpoints.",
        )
