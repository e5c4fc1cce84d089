"""The modern recipe's second implementation in PyTorch against mlxgpt, on a tiny model."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import tests.benchmarks  # noqa: F401  adds benchmarks/ to the import path
from mlxgpt.config import Config, override_config
from mlxgpt.config.resolve import resolve_config
from mlxgpt.data.token_array import TokenArray
from mlxgpt.training.schedule import learning_rate_schedule

pytest.importorskip("torch", reason="torch is not installed")
import modern_twin
import parity

STEPS = 20
TINY = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "vocab_size": 40,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "warmup_steps": 3,
    "cooldown": 0.5,
    "muon_learning_rate": 0.1,  # the blocks of so small a model have little effect
}


@pytest.fixture(scope="module")
def config() -> Config:
    settings = TINY | {"max_steps": STEPS, "dtype": "float32"}
    return override_config(resolve_config(None, "tier1-modern")[1], settings)


@pytest.fixture(scope="module")
def tokens() -> TokenArray:
    """Random tokens, of which low ids are the most frequent."""
    ids = np.random.default_rng(1).geometric(0.1, size=20_000).clip(max=40) - 1
    return TokenArray(ids.astype(np.uint16), 40)


@pytest.fixture(scope="module")
def twin_losses(config: Config, tokens: TokenArray) -> np.ndarray:
    return np.array(list(parity.pytorch_losses(config, tokens, None)))


@pytest.fixture(scope="module")
def tolerance(config: Config, tokens: TokenArray) -> np.ndarray:
    ours, control = (
        np.array(list(parity.mlxgpt_losses(variant, tokens)))
        for variant in (config, parity.split_batches(config))
    )
    return parity.allowed_difference(ours, np.abs(ours - control))


def test_mlxgpt_and_the_twin_have_the_same_losses(
    config: Config, tokens: TokenArray, twin_losses: np.ndarray, tolerance: np.ndarray
) -> None:
    ours = np.array(list(parity.mlxgpt_losses(config, tokens)))
    assert ours[0] - ours[-1] > 0.2, "something is learned"
    assert (np.abs(ours - twin_losses) <= tolerance).all()
    assert tolerance.max() < 1e-3


@pytest.mark.parametrize(
    "fault",
    [
        {"weight_decay": 0.0},
        {"qk_norm": False},
        {"embedding_norm": False},
        {"embedding_learning_rate": 0.0},
        {"beta2": 0.9},
        {"warmup_steps": 2},
        {"min_lr_ratio": 0.1},
    ],
    ids=lambda fault: next(iter(fault)),
)
def test_a_fault_exceeds_the_tolerance(
    config: Config, tokens: TokenArray, twin_losses: np.ndarray, tolerance: np.ndarray, fault: dict
) -> None:
    losses = np.array(list(parity.mlxgpt_losses(override_config(config, fault), tokens)))
    assert (np.abs(losses - twin_losses) > tolerance).any()


@pytest.mark.parametrize("warmup_steps", [0, 3, 20])
@pytest.mark.parametrize("cooldown", [0.0, 0.5, 1.0])
def test_both_schedules_are_the_same(config: Config, warmup_steps: int, cooldown: float) -> None:
    config = override_config(config, {"warmup_steps": warmup_steps, "cooldown": cooldown})
    schedule = learning_rate_schedule(config)
    ours = [float(schedule(step)) / config.optim.learning_rate for step in range(STEPS)]
    twins = [modern_twin.rate_factor(step, config) for step in range(STEPS)]
    np.testing.assert_allclose(ours, twins, rtol=1e-6)


@pytest.mark.parametrize("constant", ["MOMENTUM", "ROW_MOMENTUM"])
def test_a_fault_of_normuon_exceeds_the_tolerance(
    config: Config,
    tokens: TokenArray,
    twin_losses: np.ndarray,
    tolerance: np.ndarray,
    constant: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(modern_twin.NorMuon, constant, 0.9)
    losses = np.array(list(parity.pytorch_losses(config, tokens, None)))
    assert (np.abs(losses - twin_losses) > tolerance).any()


def test_the_command_exits_with_1_if_losses_differ(
    config: Config,
    tokens: TokenArray,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(parity, "prepare", lambda *_: (config, tokens))
    monkeypatch.setattr(sys, "argv", ["parity.py", "--steps", f"{STEPS}"])
    parity.main()
    assert f"within the tolerance at all {STEPS} steps" in capsys.readouterr().out

    monkeypatch.setattr(modern_twin, "rate_factor", lambda *_: 1.0)
    with pytest.raises(SystemExit, match=r"^step 2: the difference is "):
        parity.main()


def test_other_settings_are_rejected(config: Config, tokens: TokenArray) -> None:
    config = override_config(config, {"mlp": "relu2"})
    with pytest.raises(SystemExit, match="does not implement mlp = relu2"):
        parity.pytorch_losses(config, tokens, None)
