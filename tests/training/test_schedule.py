from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxgpt.config import Config, override_config
from mlxgpt.config.toml import find_builtin_configs, load_config
from mlxgpt.training.schedule import learning_rate_schedule


def scheduled_rates(config: Config, steps: int) -> list[float]:
    schedule = learning_rate_schedule(config)
    return [float(schedule(step)) for step in range(steps)]


def nanogpt_learning_rate(config: Config, step: int) -> float:
    """Learning rate by nanoGPT's formula (train.py, get_lr), in double precision."""
    optim = config.optim
    last_step = optim.decay_steps or config.train.max_steps
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / (optim.warmup_steps + 1)
    if step >= last_step:
        return optim.learning_rate * optim.min_lr_ratio
    decay_progress = (step - optim.warmup_steps) / (last_step - optim.warmup_steps)
    min_lr = optim.learning_rate * optim.min_lr_ratio
    return min_lr + 0.5 * (1 + math.cos(math.pi * decay_progress)) * (optim.learning_rate - min_lr)


@given(
    warmup=st.integers(0, 60),
    decay=st.integers(0, 80),
    ratio=st.floats(0.0, 1.0),
    peak=st.floats(1e-6, 1.0),
)
@settings(max_examples=30)
def test_the_cosine_schedule_matches_nanogpt(
    warmup: int, decay: int, ratio: float, peak: float
) -> None:
    options = {"warmup_steps": warmup, "decay_steps": decay, "min_lr_ratio": ratio}
    config = override_config(Config(), {**options, "learning_rate": peak, "max_steps": 70})
    expected = [nanogpt_learning_rate(config, step) for step in range(90)]
    np.testing.assert_allclose(scheduled_rates(config, 90), expected, rtol=1e-5, atol=1e-6 * peak)


@pytest.mark.parametrize("name", ["tier1", "tier2", "gpt2-124m", "gpt1-117m"])
def test_the_schedule_of_each_config_matches_nanogpt(name: str) -> None:
    config = load_config(find_builtin_configs()[name])
    steps = range(0, config.train.max_steps + 10, max(1, config.train.max_steps // 1000))
    schedule = learning_rate_schedule(config)
    actual = [float(schedule(step)) for step in steps]
    peak = config.optim.learning_rate
    expected = [nanogpt_learning_rate(config, step) for step in steps]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * peak)


def test_the_first_rate_is_not_zero_and_the_peak_is_reached() -> None:
    settings = {"learning_rate": 1.0, "warmup_steps": 9, "max_steps": 109, "min_lr_ratio": 0.1}
    actual = scheduled_rates(override_config(Config(), settings), 200)
    assert actual[0] == pytest.approx(0.1)  # a rate of zero would waste a step
    assert actual[9] == max(actual) == 1.0
    assert actual[109:] == pytest.approx([0.1] * 91)


def test_decay_steps_may_be_fewer_than_max_steps() -> None:
    config = override_config(Config(), {"warmup_steps": 0, "decay_steps": 50, "max_steps": 100})
    longer = override_config(config, {"max_steps": 1000})
    assert scheduled_rates(config, 100) == scheduled_rates(longer, 100)
    assert (
        scheduled_rates(config, 100)[50] == scheduled_rates(config, 100)[99] == pytest.approx(6e-5)
    )


def test_a_run_shorter_than_the_warmup_only_warms_up() -> None:
    config = override_config(Config(), {"warmup_steps": 100, "max_steps": 10})
    assert (np.diff(scheduled_rates(config, 10)) > 0).all()


def test_the_wsd_schedule() -> None:
    options = {"schedule": "wsd", "warmup_steps": 4, "cooldown": 0.5, "min_lr_ratio": 0.1}
    config = override_config(Config(), {**options, "learning_rate": 1.0, "max_steps": 20})
    actual = scheduled_rates(config, 24)
    np.testing.assert_allclose(actual[:4], [0.2, 0.4, 0.6, 0.8], rtol=1e-5)
    np.testing.assert_allclose(actual[4:11], 1.0)
    np.testing.assert_allclose(actual[10:21], np.linspace(1.0, 0.1, 11), rtol=1e-5)
    np.testing.assert_allclose(actual[20:], 0.1, rtol=1e-5)
    full_cooldown = override_config(config, {"cooldown": 1.0})
    np.testing.assert_allclose(
        scheduled_rates(full_cooldown, 21)[4:], np.linspace(1.0, 0.1, 17), rtol=1e-5
    )
    no_cooldown = override_config(config, {"cooldown": 0.0})
    np.testing.assert_allclose(scheduled_rates(no_cooldown, 20)[4:], 1.0)
