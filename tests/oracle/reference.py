"""Load the reference arrays, and our model with their weights."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxgpt.config import ModelConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import load_parameters

FILE = Path(__file__).with_name("reference.npz")


def load_arrays(file: Path = FILE) -> dict[str, np.ndarray]:
    with np.load(file) as stored:
        return dict(stored)


def model_and_batch() -> tuple[GPT, mx.array, dict[str, np.ndarray]]:
    """Our GPT with the reference weights, the ids [B, T + 1], and all arrays."""
    stored = load_arrays()
    config = ModelConfig(n_layer=2, n_head=2, n_embd=12, block_size=8, vocab_size=19, dropout=0.0)
    model = GPT(config)
    weights = {
        name.removeprefix("weight:"): mx.array(np.ascontiguousarray(value))
        for name, value in stored.items()
        if name.startswith("weight:")
    }
    load_parameters(model, weights)
    return model, mx.array(stored["ids"]), stored
