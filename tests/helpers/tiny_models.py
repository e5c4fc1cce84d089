from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlxgpt.config import Config
from mlxgpt.model.gpt import GPT


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
