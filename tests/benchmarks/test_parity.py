"""`python benchmarks/parity.py`, without PyTorch: mlxgpt's side, its control and the tolerance. The
modern recipe's twin is tested in tests/oracle/test_oracle_parity.py.
"""

from __future__ import annotations

import sys

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


def test_a_long_warmup_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "STORIES", 40)
    warmups = {
        steps: parity.prepare("tier1-modern", steps)[0].optim.warmup_steps for steps in (100, 200)
    }
    assert warmups == {100: 20, 200: 50}


def test_the_tolerance_grows_with_the_control() -> None:
    losses, rounding = np.full(4, 4.0), np.array([0.0, 1e-6, 0.0, 1e-4])
    allowed = parity.allowed_difference(losses, rounding)
    np.testing.assert_allclose(allowed, parity.TOLERANCE * np.array([2**-21, 1e-6, 1e-6, 1e-4]))


def test_nanogpt_is_required_for_the_classic_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "STORIES", 40)
    monkeypatch.setattr(sys, "argv", ["parity.py", "--steps", "3"])
    with pytest.raises(SystemExit, match="2"):
        parity.main()
    assert "--config tier1 is compared with nanoGPT: add --nanogpt DIR" in capsys.readouterr().err
