from __future__ import annotations

import math

import numpy as np
import pytest

from mlxgpt.config import ModelConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params


def test_initial_weights_match_gpt2() -> None:
    config = ModelConfig(n_layer=8, n_head=4, n_embd=128, block_size=64, vocab_size=300)
    for name, value in flatten_params(GPT(config, seed=3).parameters()).items():
        array = np.array(value)
        if array.ndim == 1:
            assert (array == (0 if name.endswith("bias") else 1)).all(), name
        else:
            std = 0.02 / (math.sqrt(16) if name.endswith("c_proj.weight") else 1)
            assert array.std() == pytest.approx(std, rel=0.05), name
            assert abs(array.mean()) < std / 10, name


def test_initial_weights_depend_on_the_seed() -> None:
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=5)
    same = [flatten_params(GPT(config, seed).parameters()) for seed in (1, 1, 2)]
    for name, value in same[0].items():
        assert (value == same[1][name]).all()
    assert not (same[0]["wte.weight"] == same[2]["wte.weight"]).any()
