from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mlxgpt.config import Config, OptimConfig, override
from mlxgpt.optim import learning_rate, make_optimizer
from tests.oracle import reference


def test_adamw_is_pytorchs_with_decay_on_matrices_alone() -> None:
    stored = reference.arrays()
    optimizer = make_optimizer(OptimConfig(learning_rate=0.01, weight_decay=0.1))
    values = {name: mx.array(stored[f"adamw:{name}:start"]) for name in ("matrix", "vector")}
    optimizer.init(values)
    steps = sum(name.startswith("adamw:matrix:after") for name in stored)
    assert steps == 5
    for step in range(steps):
        gradients = {name: mx.array(stored[f"adamw:{name}:gradient:{step}"]) for name in values}
        values = optimizer.apply_gradients(gradients, values)
        for name, value in values.items():
            np.testing.assert_allclose(value, stored[f"adamw:{name}:after:{step}"], atol=1e-6)


def test_clipping_is_by_the_global_norm() -> None:
    stored = reference.arrays()
    before = [mx.array(stored[f"clip:{n}:before"]) for n in (0, 1)]
    after, norm = optim.clip_grad_norm(before, 1.0)
    assert norm.item() == pytest.approx(float(stored["clip:norm"]), rel=1e-6)
    for n in (0, 1):
        np.testing.assert_allclose(after[n], stored[f"clip:{n}:after"], atol=1e-6)


def test_the_schedule_point_by_point() -> None:
    settings = {"learning_rate": 1.0, "warmup_steps": 9, "max_steps": 109, "min_lr_ratio": 0.1}
    config = override(Config(), settings)
    rates = [learning_rate(config, step) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)  # never zero, which would waste a step
    np.testing.assert_allclose(np.diff(rates[:9]), 0.1)
    assert rates[9] == max(rates) == 1.0
    assert rates[59] == pytest.approx(0.55)  # halfway down the cosine, halfway down
    assert rates[34] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[109:] == pytest.approx([0.1] * 91)
    assert (np.diff(rates[9:110]) < 0).all()


def test_decay_steps_may_end_before_the_training() -> None:
    config = override(Config(), {"warmup_steps": 0, "decay_steps": 50, "max_steps": 100})
    longer = override(config, {"max_steps": 1000})
    rates = [[learning_rate(c, step) for step in range(100)] for c in (config, longer)]
    assert rates[0] == rates[1]
    assert rates[0][50] == rates[0][99] == pytest.approx(6e-5)


def test_a_training_shorter_than_its_warmup_only_warms_up() -> None:
    config = override(Config(), {"warmup_steps": 100, "max_steps": 10})
    rates = [learning_rate(config, step) for step in range(10)]
    assert (np.diff(rates) > 0).all()
