from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlxgpt.config import Config
from mlxgpt.convert.huggingface import ImportedModel
from mlxgpt.convert.importing import create_imported_run
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
from mlxgpt.storage.run import Run


def make_random_model(config: Config) -> GPT:
    """Return a model with large random weights; its predictions are neither uniform nor certain."""
    model = GPT(config.model)
    rng = np.random.default_rng(0)
    model.update(
        tree_map(
            lambda parameter: mx.array(rng.normal(0, 0.4, parameter.shape).astype(np.float32)),
            model.parameters(),
        )
    )
    return model


def create_random_run(
    folder: Path, config: Config, tokenizer: Tokenizer, template: str | None = None
) -> Run:
    """Create an imported run of a random model with a tokenizer, and maybe a chat template."""
    parameters = flatten_params(make_random_model(config).parameters())
    model = ImportedModel(config.model, parameters, tokenizer, True, chat_template=template)
    return create_imported_run(model, folder)
