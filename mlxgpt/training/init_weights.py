"""Weights to start from, of another run instead of the seed: fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlxgpt.config import Config, validate
from mlxgpt.data.tokenizers.char import Tokenizer
from mlxgpt.model.parameters import flatten_params
from mlxgpt.storage import checkpoint
from mlxgpt.storage.loading import load_model
from mlxgpt.storage.run import Run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

# Which weights cannot change.
SHAPE = (
    "n_layer",
    "n_head",
    "n_embd",
    "vocab_size",
    "bias",
    "position",
    "norm",
    "qk_norm",
    "mlp",
    "tied",
    "embedding_norm",
    "value_embeddings",
)


@dataclass(frozen=True)
class InitWeights:
    """What a run starts from.

    Attributes:
        parameters: by their dotted names.
        tokenizer: the one that the weights know, so the one of the data.
        origin: the run and its step, and the weights' sha256: part of the new run's identity.
    """

    parameters: dict[str, mx.array]
    tokenizer: Tokenizer
    origin: Mapping[str, Any]


def init_from(run: Run, config: Config, chosen: Mapping[str, Any]) -> tuple[Config, InitWeights]:
    """The config with a run's shape, and the run's weights. Of a longer block the first positions
    are taken, as nanoGPT does.

    Args:
        config: everything else.
        chosen: the settings that were given by name.

    Raises:
        UserError: if a setting does not go with the run's weights.
    """
    theirs = run.config.model
    for name in SHAPE:
        if chosen.get(name, getattr(theirs, name)) != getattr(theirs, name):
            raise UserError(
                f"{name} = {chosen[name]} does not go with {run.name}, which has "
                f"{getattr(theirs, name)}",
                f"leave it out: a training from {run.name} has its shape.",
            )
    block = chosen.get("block_size", theirs.block_size)
    learned = theirs.position == "learned"
    if learned and block > theirs.block_size:
        raise UserError(
            f"block_size = {block} is more than the {theirs.block_size} positions that {run.name} "
            "has learned",
            f"use --block-size {theirs.block_size} or less.",
        )
    dropout = chosen.get("dropout", config.model.dropout)
    config = validate(replace(config, model=replace(theirs, block_size=block, dropout=dropout)))
    config = replace(config, data=replace(config.data, tokenizer=run.config.data.tokenizer))
    model, saved = load_model(run)
    parameters = flatten_params(model.parameters())
    if learned:
        parameters["wpe.weight"] = parameters["wpe.weight"][:block]
    mx.eval(parameters)  # or a step that fails on the GPU would leave them uncomputed
    weights = checkpoint.path_of(run.checkpoints, saved.step) / checkpoint.MODEL
    origin = {"run": run.name, "step": saved.step, "sha256": files.sha256(weights)}
    return config, InitWeights(parameters, run.tokenizer, origin)
