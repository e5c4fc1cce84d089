from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlxgpt.config import Config
from mlxgpt.model.gpt import GPT


def lively(config: Config) -> GPT:
    """A model that is neither sure nor clueless: large random weights."""
    model = GPT(config.model)
    draw = np.random.default_rng(0)
    model.update(
        tree_map(
            lambda p: mx.array(draw.normal(0, 0.4, p.shape).astype(np.float32)), model.parameters()
        )
    )
    return model
