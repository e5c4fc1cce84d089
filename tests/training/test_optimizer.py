from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mlxgpt.config import Config, OptimConfig, override_config
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
from mlxgpt.training.optimizer import ADAMW_WORK, OptimizerGroups, split_by_work
from tests.oracle import reference

Arrays = dict[str, mx.array]


def update(
    optimizer: OptimizerGroups, parameters: Arrays, gradients: Arrays, state: Arrays, rate: float
) -> tuple[Arrays, Arrays]:
    scalars = mx.array(rate), mx.array(1.0), mx.array(True)
    return optimizer.update(parameters, gradients, state, *scalars)


def assert_same_arrays(actual: Arrays, expected: Arrays) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert mx.array_equal(value, expected[name]).item(), name


def test_adamw_matches_pytorch_with_decay_only_on_matrices() -> None:
    stored = reference.load_arrays()
    values = {name: mx.array(stored[f"adamw:{name}:start"]) for name in ("matrix", "vector")}
    optimizer = OptimizerGroups(OptimConfig(weight_decay=0.1), values)
    state = optimizer.init()
    steps = sum(name.startswith("adamw:matrix:after") for name in stored)
    assert steps == 5
    for step in range(steps):
        gradients = {name: mx.array(stored[f"adamw:{name}:gradient:{step}"]) for name in values}
        values, state = update(optimizer, values, gradients, state, 0.01)
        for name, value in values.items():
            np.testing.assert_allclose(value, stored[f"adamw:{name}:after:{step}"], atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_adamw_matches_mlx_bit_for_bit(compiled: bool) -> None:
    rng = np.random.default_rng(0)
    config = OptimConfig(beta1=0.9, beta2=0.99, weight_decay=0.1)
    values = {"wide": mx.array(rng.normal(size=(9, 33)).astype(np.float32))}
    optimizer = OptimizerGroups(config, values)
    mlx_adamw = optim.AdamW(0.01, [0.9, 0.99], config.eps, 0.1, bias_correction=True)
    step = mx.compile(optimizer.update) if compiled else optimizer.update
    expected, state = values, optimizer.init()
    for _ in range(5):
        gradients = {"wide": mx.array(rng.normal(size=(9, 33)).astype(np.float32))}
        scalars = mx.array(0.01), mx.array(0.5), mx.array(True)
        values, state = step(values, gradients, state, *scalars)
        expected = mlx_adamw.apply_gradients({"wide": 0.5 * gradients["wide"]}, expected)
        assert_same_arrays(values, expected)
        assert_same_arrays(
            {moment: state[f"wide.{moment}"] for moment in "mv"}, mlx_adamw.state["wide"]
        )


def test_embeddings_can_have_a_separate_rate_and_no_decay(tiny_model: Config) -> None:
    rate_options = {"embedding_learning_rate": 0.05, "learning_rate": 0.01, "weight_decay": 0.1}
    model_options = {"tied": False, "value_embeddings": True, "optimizer": "muon", "bias": False}
    model_options |= {"value_gate": True, "smear": True, "token_shift": True}
    config = override_config(tiny_model, {**rate_options, **model_options})
    parameters = flatten_params(GPT(config.model).trainable_parameters())
    optimizer = OptimizerGroups(config.optim, parameters)
    zero_gradients = {name: mx.zeros_like(value) for name, value in parameters.items()}
    after, state = update(optimizer, parameters, zero_gradients, optimizer.init(), 0.002)
    state_dict = optimizer.to_state_dict(state)
    moment_names = [name.removesuffix(".m") for name in state_dict if name.endswith(".m")]
    last_layer = config.model.n_layer - 1
    tables = {"wte.weight", "wve.0.weight", "smear.gate.weight"}
    tables |= {f"h.{last_layer}.attn.value_gate.weight"}
    tables |= {f"h.{layer}.attn.smear.gate.weight" for layer in range(config.model.n_layer)}
    assert {name[9:] for name in moment_names if name.startswith("states.1")} == tables
    assert {layer[9:] for layer in moment_names if layer.startswith("states.2")} == {
        "lm_head.weight",
        "wpe.weight",
    }
    rates = [state_dict[f"states.{group}.learning_rate"].item() for group in range(4)]
    np.testing.assert_allclose(rates, [0.004, 0.01, 0.002, 0.002], rtol=1e-6)
    for name, before in parameters.items():
        is_decayed = name not in tables and before.ndim == 2
        assert mx.array_equal(after[name], before).item() != is_decayed, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_a_nonfinite_step_changes_nothing(
    tiny_model: Config, optimizer: str, first: bool, eps: float
) -> None:

    config = override_config(tiny_model, {"optimizer": optimizer, "bias": False, "eps": eps})
    parameters = flatten_params(GPT(config.model).trainable_parameters())
    groups = OptimizerGroups(config.optim, parameters)
    state, step = groups.init(), mx.compile(groups.update)
    if not first:
        gradients = {name: mx.ones_like(value) for name, value in parameters.items()}
        parameters, state = update(groups, parameters, gradients, state, 0.01)
    nan_gradients = {name: mx.full(value.shape, mx.nan) for name, value in parameters.items()}
    scalars = mx.array(0.01), mx.array(mx.nan), mx.array(False)
    after, new_state = step(parameters, nan_gradients, state, *scalars)
    assert_same_arrays(after, parameters)
    assert_same_arrays(new_state, state)


def test_state_dict_has_the_names_of_mlx_optimizers(tiny_model: Config) -> None:
    """It also round-trips exactly."""
    config = override_config(tiny_model, {"optimizer": "muon", "embedding_learning_rate": 0.1})
    parameters = flatten_params(GPT(config.model).trainable_parameters())
    optimizer = OptimizerGroups(config.optim, parameters)
    gradients = {name: mx.ones_like(value) for name, value in parameters.items()}
    _, state = update(optimizer, parameters, gradients, optimizer.init(), 0.01)
    state_dict = optimizer.to_state_dict(state)
    assert state_dict["states.0.h.0.attn.c_attn.weight.v"].shape == (48, 16)
    assert state_dict["states.3.step"].dtype == mx.uint64
    assert_same_arrays(optimizer.from_state_dict(state_dict), state)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_split_by_work_is_even_and_complete(tiny_model: Config, optimizer: str) -> None:
    options = {"n_layer": 3, "vocab_size": 100, "optimizer": optimizer}
    config = override_config(tiny_model, options)
    parameters = flatten_params(GPT(config.model).parameters())
    first, second = split_by_work(parameters, config.optim, 2)
    assert sorted(first + second) == sorted(parameters)
    muon_names = {n for n, p in parameters.items() if p.ndim == 2 and n.startswith("h.")}
    work = {
        n: p.size * (min(p.shape) if optimizer == "muon" and n in muon_names else ADAMW_WORK)
        for n, p in parameters.items()
    }
    imbalance = sum(work[n] for n in first) - sum(work[n] for n in second)
    assert abs(imbalance) <= max(work.values()) < sum(work.values()) / 2
    assert sorted(split_by_work(parameters, config.optim, 1)[0]) == sorted(parameters)


def test_clipping_uses_the_global_norm() -> None:
    stored = reference.load_arrays()
    before = [mx.array(stored[f"clip:{n}:before"]) for n in (0, 1)]
    after, norm = optim.clip_grad_norm(before, 1.0)
    assert norm.item() == pytest.approx(float(stored["clip:norm"]), rel=1e-6)
    for n in (0, 1):
        np.testing.assert_allclose(after[n], stored[f"clip:{n}:after"], atol=1e-6)
