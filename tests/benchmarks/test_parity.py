"""`python benchmarks/parity.py`, without nanoGPT: mlxgpt's side and its control."""

from __future__ import annotations

import numpy as np
import parity
import pytest

from mlxgpt.config import override_config


def test_the_control_has_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "STORIES", 40)
    config, tokens = parity.prepare("tier1", 3)
    small = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16, "batch_size": 4}
    config = override_config(config, small)
    split = parity.split_batches(config)
    assert split.sequences_per_step == config.sequences_per_step
    losses, control = (list(parity.mlxgpt_losses(c, tokens)) for c in (config, split))
    np.testing.assert_allclose(losses, control, atol=1e-5)
    assert len(set(losses)) == 3
    assert parity.initial_parameters(config)["wte.weight"].shape == (tokens.vocab_size, 16)
