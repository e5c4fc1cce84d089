from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxgpt.config import Config, OptimConfig, override_config
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
from mlxgpt.training.muon import NS_COEFFICIENTS, NS_STEPS, ROW_MOMENTUM, Muon, orthogonalize
from mlxgpt.training.optimizer import OptimizerGroups


def orthogonalize_by_svd(x: np.ndarray) -> np.ndarray:
    """Reference for the Newton–Schulz steps in double precision: apply the quintic polynomial to
    each singular value.
    """
    a, b, c = NS_COEFFICIENTS
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(NS_STEPS):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


def random_normal(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.normal(size=shape).astype(np.float32))


def update(muon: Muon, gradients: dict, state: dict, is_finite: bool = True) -> tuple[dict, dict]:
    return muon.update(gradients, state, mx.array(1.0), mx.array(is_finite))


@given(rows=st.integers(1, 12), more=st.integers(0, 20), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_orthogonalization_matches_the_svd(rows: int, more: int, seed: int) -> None:
    """For stacks of wide and tall matrices."""
    rng = np.random.default_rng(seed)
    shapes = [(3, rows, rows + more), (2, rows + more, rows)]
    stacks = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    flat = mx.array(np.concatenate([stack.reshape(-1) for stack in stacks]))
    for orthogonal, stack in zip(orthogonalize(flat, shapes), stacks, strict=True):
        for actual, matrix in zip(np.array(orthogonal), stack, strict=True):
            np.testing.assert_allclose(actual, orthogonalize_by_svd(matrix), atol=2e-4)


def test_singular_values_are_close_to_one() -> None:
    x = mx.random.normal((16 * 48,), key=mx.random.key(0))
    (orthogonal,) = orthogonalize(x, [(1, 16, 48)])
    values = np.linalg.svd(np.array(orthogonal)[0], compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.3


def normalize_rows(step: np.ndarray, row_mean_squares: np.ndarray) -> np.ndarray:
    """Turn a step of Muon into one of NorMuon; updates the running mean squares in place."""
    row_mean_squares *= ROW_MOMENTUM
    row_mean_squares += (1 - ROW_MOMENTUM) * np.square(step).mean(axis=1)
    normalized = step / np.sqrt(row_mean_squares)[:, None]
    return normalized * np.linalg.norm(step) / np.linalg.norm(normalized)


def test_muon_matches_mlx_with_normalized_rows() -> None:
    """Without weight decay, with the same rate and momentum, over three steps."""
    mlx_muon, rng = optim.Muon(0.02, 0.95, 0.0), np.random.default_rng(1)
    shapes = {"wide": (8, 20), "tall": (20, 8), "square": (8, 8), "also": (8, 8)}
    start = {name: random_normal(rng, *shape) for name, shape in shapes.items()}
    muon = Muon(shapes)
    state = muon.init()
    mlx_muon.init(start)
    rows = {name: np.zeros(rows) for name, (rows, _) in shapes.items()}
    for _ in range(3):
        gradients = {name: random_normal(rng, *shape) for name, shape in shapes.items()}
        steps, state = update(muon, gradients, state)
        updated = mlx_muon.apply_gradients(gradients, start)
        for name in shapes:
            step = (np.array(start[name]) - np.array(updated[name])) / 0.02
            expected = normalize_rows(step, rows[name])
            np.testing.assert_allclose(steps[name], expected, atol=1e-3, err_msg=name)


def test_updates_of_all_rows_have_about_the_same_size() -> None:
    """Even where the gradient of a row is always very small or very large."""
    muon, rng = Muon({"a": (6, 4)}), np.random.default_rng(5)
    state, sizes = muon.init(), []
    for _ in range(40):
        gradient = rng.normal(size=(6, 4)) * [[1e-3], [1], [1], [1], [1], [1e3]]
        steps, state = update(muon, {"a": mx.array(gradient.astype(np.float32))}, state)
        sizes.append(np.linalg.norm(np.array(steps["a"]), axis=1))
    size = np.sqrt(np.square(sizes[20:]).mean(axis=0))
    assert size.max() < 1.3 * size.min()


def test_a_zero_gradient_gives_a_zero_update() -> None:
    muon = Muon({"a": (4, 6)})
    steps, _ = update(muon, {"a": mx.zeros((4, 6))}, muon.init())
    assert not steps["a"].any()


def test_queries_keys_and_values_are_orthogonalized_separately() -> None:
    gradient = random_normal(np.random.default_rng(2), 24, 8)
    name, third_gradients = (
        "h.0.attn.c_attn.weight",
        {f"m{n}": third for n, third in enumerate(gradient.split(3))},
    )
    joint, separate = Muon({name: (24, 8)}), Muon(dict.fromkeys(third_gradients, (8, 8)))
    joint_step = np.array(update(joint, {name: gradient}, joint.init())[0][name])
    separate_steps = update(separate, third_gradients, separate.init())[0]
    # Equal except for the norms of the rows, which are normalized over all three matrices.
    stacked_steps = np.concatenate([np.array(separate_steps[name]) for name in third_gradients])
    for joint_row, separate_row in zip(joint_step, stacked_steps, strict=True):
        np.testing.assert_allclose(
            joint_row / np.linalg.norm(joint_row),
            separate_row / np.linalg.norm(separate_row),
            atol=1e-5,
        )
    lengths = np.linalg.norm(joint_step, axis=1)
    np.testing.assert_allclose(lengths, lengths.mean(), rtol=1e-4)


def test_stacking_does_not_change_the_update_of_a_matrix() -> None:
    """The state of each matrix is the same, too."""
    rng = np.random.default_rng(4)
    shapes = {"h.0.attn.c_attn.weight": (24, 8), "b": (20, 8), "a": (20, 8), "c": (8, 20)}
    gradients = {name: random_normal(rng, *shape) for name, shape in shapes.items()}
    muon = Muon(shapes)
    steps, state = update(muon, gradients, muon.init())
    moments = {(name, moment): value for name, moment, value in muon.split(state)}
    for name, shape in shapes.items():
        alone = Muon({name: shape})
        step, alone_state = update(alone, {name: gradients[name]}, alone.init())
        np.testing.assert_allclose(steps[name], step[name], rtol=1e-4, atol=1e-6)
        for _, moment, value in alone.split(alone_state):
            assert moments[name, moment].shape == (shape if moment == "v" else (shape[0], 1))
            np.testing.assert_allclose(moments[name, moment], value, rtol=1e-4)
    joined = muon.join(lambda name, moment: moments[name, moment])
    assert all(mx.array_equal(joined[moment], state[moment]) for moment in state)


def state_names(optimizer: OptimizerGroups, group: int) -> set[str]:
    prefix = f"states.{group}."
    state_dict = optimizer.to_state_dict(optimizer.init())
    return {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}


def test_muon_updates_block_matrices_and_adamw_the_rest(tiny_model: Config) -> None:
    config = override_config(tiny_model, {"optimizer": "muon", "bias": False})
    assert config.optim.embedding_learning_rate == 0
    parameters = flatten_params(GPT(config.model).trainable_parameters())
    muon_names, adamw_names, other_names = (
        state_names(OptimizerGroups(config.optim, parameters), group) for group in range(3)
    )
    matrices = {
        n for n, parameter in parameters.items() if n.startswith("h.") and parameter.ndim == 2
    }
    common_names = {"step", "learning_rate"}
    assert (
        muon_names
        == {f"{name}.{part}" for name in matrices for part in ("v", "rows")} | common_names
    )
    assert (
        adamw_names
        == {f"{name}.weight.{moment}" for name in ("wte", "wpe") for moment in "mv"} | common_names
    )
    assert {name.rsplit(".", 1)[0] for name in other_names - common_names} == {
        n for n, parameter in parameters.items() if parameter.ndim == 1
    }


@pytest.mark.parametrize(("rate", "decay"), [(0.0, 0.1), (1e-3, 0.0), (1e-3, 0.1)])
def test_muon_learning_rate_and_decoupled_weight_decay(rate: float, decay: float) -> None:
    options = {"optimizer": "muon", "learning_rate": 2e-3, "muon_learning_rate": 0.02}
    parameters = {"h.0.weight": 3 * mx.eye(4)}
    optimizer = OptimizerGroups(OptimConfig(**options, weight_decay=decay), parameters)  # type: ignore[arg-type]
    scalars = mx.array(rate), mx.array(1.0), mx.array(True)
    after, _ = optimizer.update(parameters, {"h.0.weight": mx.eye(4)}, optimizer.init(), *scalars)
    step = 10 * rate * float(orthogonalize_by_svd(np.eye(4))[0, 0])
    expected = 3 * (1 - 10 * rate * decay) - step
    np.testing.assert_allclose(after["h.0.weight"], expected * np.eye(4), rtol=1e-5)
