from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxgpt.config import Config, OptimConfig, override
from mlxgpt.model.gpt import GPT, flat
from mlxgpt.training.muon import QUINTIC, ROW_MOMENTUM, STEPS, Muon, orthogonalised
from mlxgpt.training.optim import make_optimizer


def by_svd(x: np.ndarray) -> np.ndarray:
    """What the steps do to a matrix, in double precision: each singular value alone goes through
    the quintic.
    """
    a, b, c = QUINTIC
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


@given(rows=st.integers(1, 12), more=st.integers(0, 20), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_each_singular_value_goes_through_the_quintic(rows: int, more: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(3, rows, rows + more)).astype(np.float32)
    found = np.array(orthogonalised(mx.array(x)))
    for one, expected in zip(found, x, strict=True):
        np.testing.assert_allclose(one, by_svd(expected), atol=2e-4)


def test_singular_values_come_near_one() -> None:
    x = mx.random.normal((1, 16, 48), key=mx.random.key(0))
    values = np.linalg.svd(np.array(orthogonalised(x))[0], compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.3


def evened(step: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """NorMuon's step of a Muon's; each row's running mean square is brought up to date."""
    rows *= ROW_MOMENTUM
    rows += (1 - ROW_MOMENTUM) * np.square(step).mean(axis=1)
    even = step / np.sqrt(rows)[:, None]
    return even * np.linalg.norm(step) / np.linalg.norm(even)


def test_without_decay_it_is_mlxs_own_with_even_rows() -> None:
    """For matrices that are one: MLX's Muon, the same rate and momentum, over three steps."""
    ours, theirs = Muon(0.95, 0.0), optim.Muon(0.02, 0.95, 0.0)
    ours.learning_rate = 0.02
    draw = np.random.default_rng(1)
    shapes = {"wide": (8, 20), "tall": (20, 8), "square": (8, 8), "also": (8, 8)}
    start = {n: mx.array(draw.normal(size=s).astype(np.float32)) for n, s in shapes.items()}
    ours.init(start)
    theirs.init(start)
    mine, expected = start, {name: np.array(value) for name, value in start.items()}
    rows = {name: np.zeros(rows) for name, (rows, _) in shapes.items()}
    for _ in range(3):
        gradients = {n: mx.array(draw.normal(size=s).astype(np.float32)) for n, s in shapes.items()}
        mine = ours.apply_gradients(gradients, mine)
        moved = theirs.apply_gradients(gradients, start)
        for name in shapes:
            step = np.array(start[name]) - np.array(moved[name])
            expected[name] = expected[name] - 0.02 * evened(step / 0.02, rows[name])
            np.testing.assert_allclose(mine[name], expected[name], atol=2e-5, err_msg=name)


def test_no_row_moves_more_than_the_others_for_long() -> None:
    """Whose gradient is always small, or in the way of another's, moves as much as each."""
    muon, draw = Muon(0.95, 0.0), np.random.default_rng(5)
    muon.learning_rate = 0.02
    before, sizes = mx.zeros((6, 4)), []
    for _ in range(40):
        gradient = draw.normal(size=(6, 4)) * [[1e-3], [1], [1], [1], [1], [1e3]]
        after = muon.apply_gradients({"a": mx.array(gradient.astype(np.float32))}, {"a": before})[
            "a"
        ]
        sizes.append(np.linalg.norm(np.array(after - before), axis=1))
        before = after
    size = np.sqrt(np.square(sizes[20:]).mean(axis=0))
    assert size.max() < 1.3 * size.min()


def test_a_gradient_of_nothing_moves_nothing() -> None:
    muon = Muon(0.95, 0.0)
    muon.learning_rate = 0.02
    start = mx.random.normal((4, 6), key=mx.random.key(3))
    assert mx.array_equal(muon.apply_gradients({"a": mx.zeros((4, 6))}, {"a": start})["a"], start)


def test_queries_keys_and_values_are_three_matrices() -> None:
    draw = np.random.default_rng(2)
    gradient = mx.array(draw.normal(size=(24, 8)).astype(np.float32))
    whole, parts = Muon(0.95, 0.0), Muon(0.95, 0.0)
    for one in (whole, parts):
        one.learning_rate = 0.02
    zero = mx.zeros((24, 8))
    together = whole.apply_gradients(
        {"h": [{"c_attn": {"weight": gradient}}]}, {"h": [{"c_attn": {"weight": zero}}]}
    )["h"][0]["c_attn"]["weight"]
    thirds = {f"m{n}": part for n, part in enumerate(mx.split(gradient, 3))}
    apart = parts.apply_gradients(thirds, {name: mx.zeros((8, 8)) for name in thirds})
    # In all but their rows' lengths, which are made even over all three.
    of_thirds = np.concatenate([np.array(apart[name]) for name in thirds])
    for one, other in zip(np.array(together), of_thirds, strict=True):
        np.testing.assert_allclose(
            one / np.linalg.norm(one), other / np.linalg.norm(other), atol=1e-5
        )


def test_decay_is_apart_from_the_gradient() -> None:
    muon = Muon(0.95, 0.1)
    muon.learning_rate = 0.02
    start = mx.random.normal((4, 6), key=mx.random.key(3))
    after = muon.apply_gradients({"a": mx.zeros((4, 6))}, {"a": start})["a"]
    np.testing.assert_allclose(after, start * (1 - 0.02 * 0.1), rtol=1e-6)


def test_matrices_of_the_blocks_are_muons_and_the_rest_adamws(tiny_model: Config) -> None:
    config = override(tiny_model, {"optimizer": "muon", "bias": False})
    assert config.optim.embedding_learning_rate == 0
    parameters = GPT(config.model).trainable_parameters()
    optimizer = make_optimizer(config.optim)
    optimizer.init(parameters)
    muons, adamws, others = ({*flat(o.state)} for o in optimizer.optimizers)
    matrices = {n for n, p in flat(parameters).items() if n.startswith("h.") and p.ndim == 2}
    kept = {"step", "learning_rate"}
    assert muons == {f"{name}.{part}" for name in matrices for part in ("v", "rows")} | kept
    assert adamws == {f"{name}.weight.{m}" for name in ("wte", "wpe") for m in "mv"} | kept
    assert {name.rsplit(".", 1)[0] for name in others - kept} == {
        n for n, p in flat(parameters).items() if p.ndim == 1
    }


@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_rates_are_relative_to_adamws(rate: float) -> None:
    optimizer = make_optimizer(
        OptimConfig(optimizer="muon", learning_rate=2e-3, muon_learning_rate=0.02, weight_decay=0.0)
    )
    optimizer.set_learning_rate(mx.array(rate))
    start = {"h": [{"weight": mx.eye(4)}]}
    after = optimizer.apply_gradients({"h": [{"weight": mx.eye(4)}]}, start)["h"][0]["weight"]
    length = float(mx.linalg.norm(after - mx.eye(4))) / 2
    assert length == pytest.approx(10 * rate * float(by_svd(np.eye(4))[0, 0]), rel=1e-4)
