"""Fine-tuning: initialize a run from the weights of another run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlxgpt.config import Config, validate_config
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.model.parameters import flatten_params
from mlxgpt.storage import checkpoint
from mlxgpt.storage.loading import load_model
from mlxgpt.storage.run import Run
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

# Config fields that are fixed by the weights.
ARCHITECTURE_FIELDS = (
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
    "value_gate",
    "smear",
    "token_shift",
)


@dataclass(frozen=True)
class InitWeights:
    """Initial weights from another run.

    Attributes:
        parameters: by dotted name.
        tokenizer: tokenizer of the other run; the data must use the same one.
        origin: run name, step and SHA-256 of the weights; part of the new run's identity.
    """

    parameters: dict[str, mx.array]
    tokenizer: Tokenizer
    origin: Mapping[str, Any]


def load_init_weights(
    run: Run, config: Config, explicit_settings: Mapping[str, Any]
) -> tuple[Config, InitWeights]:
    """Load a run's weights, and set `config` to the run's architecture. A smaller block size keeps
    the first position embeddings, as in nanoGPT.

    Args:
        config: all other settings.
        explicit_settings: settings that the user passed by name.

    Raises:
        UserError: if a setting conflicts with the run's weights.
    """
    model_config = run.config.model
    for name in ARCHITECTURE_FIELDS:
        value = getattr(model_config, name)
        if explicit_settings.get(name, value) != value:
            raise UserError(
                f"{name} = {explicit_settings[name]} conflicts with {run.name}, which has "
                f"{name} = {value}",
                f"omit it: a run initialized from {run.name} has the same architecture.",
            )
    block_size = explicit_settings.get("block_size", model_config.block_size)
    has_learned_positions = model_config.position == "learned"
    if has_learned_positions and block_size > model_config.block_size:
        raise UserError(
            f"block_size = {block_size} exceeds the block size of {run.name}, "
            f"{model_config.block_size}",
            f"use --block-size {model_config.block_size} or less.",
        )
    dropout = explicit_settings.get("dropout", config.model.dropout)
    config = validate_config(
        replace(config, model=replace(model_config, block_size=block_size, dropout=dropout))
    )
    config = replace(config, data=replace(config.data, tokenizer=run.config.data.tokenizer))
    model, saved_checkpoint = load_model(run)
    parameters = flatten_params(model.parameters())
    if has_learned_positions:
        parameters["wpe.weight"] = parameters["wpe.weight"][:block_size]
    mx.eval(parameters)  # now, so that a failing GPU step cannot leave them unevaluated
    folder = checkpoint.checkpoint_folder(run.checkpoints, saved_checkpoint.step)
    sha256 = files.sha256_file(folder / checkpoint.MODEL_FILE)
    origin = {"run": run.name, "step": saved_checkpoint.step, "sha256": sha256}
    return config, InitWeights(parameters, run.tokenizer, origin)
