from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.backend import device, execution, ops
from mlxgpt.backend.cpu import kernels, parallel
from mlxgpt.config import Config, override_config
from mlxgpt.data.token_array import Batch, TokenArray
from mlxgpt.distributed.group import LocalGroup
from mlxgpt.model import gpt
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import make_eval_step, token_losses
from mlxgpt.model.parameters import flatten_params
from mlxgpt.training.step import StepInputs, TrainStep, select_rank_rows
from mlxgpt.utils.errors import UserError
from tests.helpers.training_runs import MODERN_PARTS


def random_ids(*shape: int) -> mx.array:
    return mx.random.randint(0, 19, shape, key=mx.random.key(3))


def compute_gradients(config: Config, ids: mx.array) -> tuple[float, dict[str, np.ndarray]]:
    step = TrainStep(GPT(config.model, 5), config)
    loss, gradients = step.compute_gradients(Batch(ids[..., :-1], ids[..., 1:]), mx.random.key(2))
    return float(loss), {name: np.array(value) for name, value in flatten_params(gradients).items()}


@pytest.mark.parametrize(("micro_batches", "batch_size"), [(4, 2), (8, 1), (2, 3), (3, 3), (3, 1)])
def test_micro_batches_match_one_batch(
    tiny_model: Config, micro_batches: int, batch_size: int
) -> None:
    """Whether CPU threads split each micro-batch, share all of them, or only one thread runs."""
    full_config = override_config(
        tiny_model, {"dropout": 0.0, "batch_size": micro_batches * batch_size}
    )
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": micro_batches}
    micro_config = override_config(full_config, sizes)
    ids = random_ids(micro_batches * batch_size, 9)
    loss, gradients = compute_gradients(full_config, ids[None])
    micro_loss, means = compute_gradients(micro_config, ids.reshape(micro_batches, batch_size, 9))
    assert micro_loss == pytest.approx(loss, abs=1e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(means[name], gradient, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_half_batches_in_chunks_match_one_batch(
    tiny_model: Config, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks that a CPU thread processes one after the other."""
    config = override_config(tiny_model, {"dropout": 0.0, "batch_size": 12})
    ids = random_ids(micro_batches, 12, 9)
    loss, gradients = compute_gradients(config, ids)
    monkeypatch.setattr(kernels, "MIN_SIZE", 0)
    monkeypatch.setattr(parallel, "MAX_CHUNK_TOKENS", 2 * 8)
    assert execution.chunks_per_thread(12, 8) == (3 if execution.thread_count() == 2 else 1)
    chunked_loss, means = compute_gradients(config, ids)
    assert chunked_loss == pytest.approx(loss, abs=1e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(means[name], gradient, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("modern", [False, True])
def test_cpu_kernels_and_mlx_kernels_give_the_same_losses(
    tiny_model: Config, modern: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 20 steps: CPU kernels with chunks on all threads, and the GPU code on one thread."""
    parts: dict[str, Any] = {"norm": "rms", "position": "rope", "qk_norm": True, "mlp": "swiglu"}
    config = override_config(
        tiny_model, {"batch_size": 8, "dropout": 0.0, **(parts if modern else {})}
    )

    def losses() -> list[float]:
        step = TrainStep(GPT(config.model, 5), config)
        step_losses = []
        for n in range(20):
            ids = mx.random.randint(0, 19, (1, 8, 9), key=mx.random.key(n))
            loss, _ = step(Batch(ids[..., :-1], ids[..., 1:]), mx.array(1e-3), mx.random.key(n))
            step_losses.append(float(loss))
        return step_losses

    monkeypatch.setattr(kernels, "MIN_SIZE", 0)
    monkeypatch.setattr(parallel, "MAX_CHUNK_TOKENS", 2 * 8)
    cpu_losses = losses()
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    np.testing.assert_allclose(cpu_losses, losses(), atol=1e-5)


def is_row_contiguous(array: mx.array) -> bool:
    return np.array(array, copy=False).flags.c_contiguous


@pytest.mark.parametrize("changes", [{}, {"bias": False}, MODERN_PARTS])
def test_gradients_on_a_gpu_are_row_contiguous(
    tiny_model: Config, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the optimizer's kernels need no strides; the values are the same as without this."""
    config = override_config(tiny_model, {"dropout": 0.0, **changes})
    monkeypatch.setattr(device, "on_cpu", lambda: False)

    def gradients(ids: mx.array) -> dict[str, mx.array]:
        step = TrainStep(GPT(config.model, 5), config)
        _, tree = step.compute_gradients(Batch(ids[..., :-1], ids[..., 1:]), mx.random.key(0))
        mx.eval(tree)
        return flatten_params(tree)

    ids = random_ids(1, 4, 9)
    actual = gradients(ids)
    assert [name for name, array in actual.items() if not is_row_contiguous(array)] == []
    monkeypatch.setattr(ops, "matmul", lambda x, weight: x @ weight.T)
    monkeypatch.setattr(
        ops, "matmul_plus_bias", lambda x, weight, bias: mx.addmm(bias, x, weight.T)
    )
    expected = gradients(ids)
    assert not all(map(is_row_contiguous, expected.values())), "MLX does it now"
    for name, value in actual.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6, err_msg=name)


def test_gradient_accumulation_matches_a_large_batch(tiny_model: Config) -> None:
    full_config = override_config(tiny_model, {"dropout": 0.0, "batch_size": 8})
    micro_config = override_config(full_config, {"batch_size": 2, "gradient_accumulation_steps": 4})
    results = []
    for config, shape in ((full_config, (1, 8, 9)), (micro_config, (4, 2, 9))):
        step = TrainStep(GPT(config.model, 5), config)
        norms = []
        for n in range(5):
            ids = mx.random.randint(0, 19, (8, 9), key=mx.random.key(n)).reshape(shape)
            norms.append(
                float(step(Batch(ids[..., :-1], ids[..., 1:]), mx.array(1e-3), mx.random.key(n))[1])
            )
        results.append((norms, flatten_params(step.model.parameters())))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-4)
    for name, value in results[0][1].items():
        np.testing.assert_allclose(value, results[1][1][name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("portions", [False, True])
def test_memory_does_not_grow_with_the_number_of_micro_batches(
    tiny_model: Config, portions: bool
) -> None:
    """On a CPU it does not grow with the number of chunks of a batch either."""
    if portions and execution.thread_count() == 1:
        pytest.skip("a matter of the CPU")
    shape = {"block_size": 64, "n_embd": 64, "dropout": 0.0}

    def peak_bytes(number: int) -> int:
        A, B = (1, 16 * number) if portions else (number, 8)
        sizes = {"batch_size": B, "gradient_accumulation_steps": A}
        config = override_config(tiny_model, {**shape, **sizes})
        step = TrainStep(GPT(config.model, 5), config)
        ids = random_ids(A, B, 65)
        for _ in range(2):
            mx.eval(
                step(Batch(ids[..., :-1], ids[..., 1:]), mx.array(1e-3), mx.random.key(0)),
                step.state,
            )
            gc.collect()
            mx.clear_cache()
            mx.reset_peak_memory()
        mx.eval(
            step(Batch(ids[..., :-1], ids[..., 1:]), mx.array(1e-3), mx.random.key(0)), step.state
        )
        return mx.get_peak_memory()

    few_bytes, many_bytes = peak_bytes(4), peak_bytes(40)
    assert many_bytes < 1.5 * few_bytes, (
        few_bytes,
        many_bytes,
    )  # about ten times as much if all were in memory simultaneously


@pytest.mark.parametrize(("micro_batches", "batch_size"), [(1, 4), (3, 4), (2, 1)])
def test_every_dropout_mask_of_a_step_is_different(
    tiny_model: Config, micro_batches: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each micro-batch, CPU thread and dropout layer has a separate key."""
    keys: list[str] = []
    original = gpt.dropout

    def record_key(x: mx.array, rate: float, key: mx.array | None) -> mx.array:
        assert key is not None
        keys.append(str(key.tolist()))
        return original(x, rate, key)

    monkeypatch.setattr(gpt, "dropout", record_key)
    config = override_config(tiny_model, {"gradient_accumulation_steps": micro_batches})
    step = TrainStep(GPT(config.model, 5), config, compiled=False)
    ids = random_ids(micro_batches, batch_size, 9)
    mx.eval(step.compute_gradients(Batch(ids[..., :-1], ids[..., 1:]), mx.random.key(2)))
    threads = execution.thread_count()
    passes = micro_batches * (1 if batch_size % threads else threads)
    assert len(keys) == passes * (1 + 2 * config.model.n_layer)
    assert len(set(keys)) == len(keys)


def test_dropout_depends_on_the_key_in_the_compiled_step(tiny_model: Config) -> None:
    step = TrainStep(GPT(tiny_model.model, 5), tiny_model)
    ids = random_ids(1, 4, 9)
    losses = [
        float(step.compute_gradients(Batch(ids[..., :-1], ids[..., 1:]), mx.random.key(n))[0])
        for n in (0, 1, 0)
    ]
    assert losses[0] == losses[2] != losses[1]


def test_steps_lower_the_loss_and_keep_the_parameter_names(tiny_model: Config) -> None:
    step = TrainStep(GPT(tiny_model.model, 5), tiny_model)
    names = list(flatten_params(step.model.parameters()))
    ids = random_ids(1, 4, 9)
    losses = [
        float(step(Batch(ids[..., :-1], ids[..., 1:]), mx.array(1e-2), mx.random.key(0))[0])
        for _ in range(20)
    ]
    assert losses[-1] < losses[0] - 0.5
    assert list(flatten_params(step.model.parameters())) == names


def test_bfloat16_keeps_float32_weights(tiny_model: Config) -> None:
    results = []
    for dtype in ("bfloat16", "float32"):
        config = override_config(tiny_model, {"dtype": dtype, "dropout": 0.0})
        step = TrainStep(GPT(config.model, 5), config)
        ids = random_ids(1, 4, 9)
        loss = float(step(Batch(ids[..., :-1], ids[..., 1:]), mx.array(1e-6), mx.random.key(0))[0])
        values = flatten_params(step.model.parameters())
        assert all(value.dtype == mx.float32 for value in values.values())
        results.append((loss, values))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-2)
    assert results[0][0] != results[1][0]
    # Updates with a rate of 1e-6 would be lost in a 16-bit weight.
    before = flatten_params(GPT(tiny_model.model, 5).parameters())["wte.weight"]
    assert not (before == results[0][1]["wte.weight"]).any()


class RoundingGroup(LocalGroup):
    """A single rank that rounds gradients as an all-reduce does."""

    def average(
        self, loss: mx.array, gradients: dict[str, mx.array], dtype: mx.Dtype
    ) -> tuple[mx.array, dict[str, mx.array]]:
        self.loss_dtype = loss.dtype
        return loss, {n: g.astype(dtype).astype(mx.float32) for n, g in gradients.items()}


@pytest.mark.exact_bits  # the gradient is computed twice and then rounded
@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_gradients_are_averaged_in_reduce_dtype_and_the_loss_in_float32(
    tiny_model: Config, reduce_dtype: str
) -> None:
    """Read from AdamW's first moment after one step."""
    changes = {"reduce_dtype": reduce_dtype, "dropout": 0.0, "beta1": 0.0, "grad_clip": 0.0}
    config, ids = override_config(tiny_model, changes), random_ids(1, 4, 9)
    loss, gradients = compute_gradients(config, ids)
    group = RoundingGroup()
    step = TrainStep(GPT(config.model, 5), config, group)
    step_loss, _ = step(Batch(ids[..., :-1], ids[..., 1:]), mx.array(1e-3), mx.random.key(2))
    assert float(step_loss) == loss
    assert group.loss_dtype == mx.float32
    moments = step.state_dicts()[1]
    for name, gradient in gradients.items():
        rounded = mx.array(gradient).astype(getattr(mx, reduce_dtype)).astype(mx.float32)
        (moment,) = (moments[key] for key in moments if key.endswith(f".{name}.m"))
        np.testing.assert_allclose(moment, rounded, rtol=1e-5, atol=1e-8, err_msg=name)


def test_losses_are_computed_in_float32() -> None:
    logits = mx.random.normal((2, 5, 19), key=mx.random.key(0)).astype(mx.bfloat16)
    losses = token_losses(logits, random_ids(2, 5))
    assert losses.dtype == mx.float32
    assert (losses == token_losses(logits.astype(mx.float32), random_ids(2, 5))).all()


@pytest.mark.parametrize(("grad_clip", "share"), [(0.0, 1.0), (1e9, 1.0), (0.5, 0.5)])
def test_gradient_clipping(tiny_model: Config, grad_clip: float, share: float) -> None:
    """Read from AdamW's first moment after one step."""
    config = override_config(tiny_model, {"grad_clip": grad_clip, "dropout": 0.0, "beta1": 0.0})
    step, ids = TrainStep(GPT(config.model, 5), config), random_ids(1, 4, 9)
    step.model.wte.weight = step.model.wte.weight * 100  # for a large gradient
    gradients = flatten_params(
        step.compute_gradients(Batch(ids[..., :-1], ids[..., 1:]), mx.random.key(0))[1]
    )
    _, norm = step(Batch(ids[..., :-1], ids[..., 1:]), mx.array(1e-3), mx.random.key(0))
    assert float(norm) > 2
    share = share / float(norm) if share < 1 else share
    moments = step.state_dicts()[1]
    np.testing.assert_allclose(
        moments["states.0.wte.weight.m"], share * gradients["wte.weight"], rtol=1e-4, atol=1e-7
    )


def test_updates_are_proportional_to_the_learning_rate(tiny_model: Config) -> None:
    config = override_config(tiny_model, {"weight_decay": 0.0, "dropout": 0.0})
    ids = random_ids(1, 4, 9)
    updates = []
    for rate in (1e-3, 2e-3):
        model = GPT(config.model, 5)
        before = np.array(model.ln_f.weight)
        TrainStep(model, config)(
            Batch(ids[..., :-1], ids[..., 1:]), mx.array(rate), mx.random.key(0)
        )
        updates.append(np.array(model.ln_f.weight) - before)
    np.testing.assert_allclose(2 * updates[0], updates[1], rtol=1e-3)


def test_the_evaluation_step_uses_the_mask_and_new_weights(tiny_model: Config) -> None:
    model = GPT(tiny_model.model, 5)
    evaluate = make_eval_step(model, mx.float32)
    ids = random_ids(4, 9)
    mask = mx.array(np.random.default_rng(0).integers(0, 2, (4, 8)).astype(np.float32))
    for _ in range(2):
        losses = token_losses(model(ids[:, :-1]), ids[:, 1:])
        actual = evaluate(model.parameters(), ids[:, :-1], ids[:, 1:], mask)
        assert float(actual) == pytest.approx(float((losses * mask).sum()), rel=1e-5)
        model.wte.weight = model.wte.weight * 5  # different weights for the second pass


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("cause", ["loss", "limit", "gradient"])
def test_a_skipped_step_changes_nothing(
    tiny_model: Config, cause: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the weights nor the moments nor the optimizer's step count."""
    config = override_config(tiny_model, {"grad_clip": 0.0, "optimizer": optimizer})
    step = TrainStep(GPT(config.model, 5), config)
    ids, key = random_ids(1, 4, 9), mx.random.key(2)
    mx.eval(step(Batch(ids[..., :-1], ids[..., 1:]), mx.array(1e-2), key), step.state)
    if cause == "loss":
        step.model.wte.weight[0, 0] = float("inf")
    if cause == "gradient":
        original = step._sum_gradients

        def make_gradient_infinite(*args: Any) -> tuple[mx.array, dict, float]:
            loss, gradients, parts = original(*args)
            return loss, gradients | {"wte.weight": mx.full((19, 16), mx.inf)}, parts

        monkeypatch.setattr(step, "_sum_gradients", make_gradient_infinite)
    before = [{k: np.array(v) for k, v in arrays.items()} for arrays in step.state_dicts()]
    limit = 0.5 if cause == "limit" else float("inf")
    loss, norm = step(Batch(ids[..., :-1], ids[..., 1:]), mx.array(1e-2), key, limit)
    are_finite = np.isfinite(float(loss)), np.isfinite(float(norm))
    assert (
        are_finite
        == {"loss": (False, False), "limit": (True, True), "gradient": (True, False)}[cause]
    )
    for old, new in zip(before, step.state_dicts(), strict=True):
        for name, value in old.items():
            assert (value == np.array(new[name])).all(), name
    if cause == "limit":
        step(Batch(ids[..., :-1], ids[..., 1:]), mx.array(1e-2), key, float(loss))
        assert not (before[0]["wte.weight"] == np.array(step.state_dicts()[0]["wte.weight"])).all()


@given(A=st.integers(1, 4), B=st.integers(1, 12), size=st.integers(1, 6), T=st.integers(1, 3))
def test_every_row_is_assigned_to_one_rank(A: int, B: int, size: int, T: int) -> None:
    ids = np.arange(A * B * T).reshape(A, B, T)
    if A * B % size:
        with pytest.raises(UserError, match="cannot be split evenly"):
            select_rank_rows(ids, 0, size)
        return
    rows = [select_rank_rows(ids, rank, size) for rank in range(size)]
    assert len({rank_rows.shape for rank_rows in rows}) == 1, "none waits for another"
    assert all(rank_rows.shape[1] <= B for rank_rows in rows), (
        "none needs more memory than one machine"
    )
    all_rows = np.concatenate([rank_rows.reshape(-1, T) for rank_rows in rows])
    assert (all_rows == ids.reshape(-1, T)).all()
    if size == 1:
        assert rows[0].shape == ids.shape


def test_weights_scale_the_loss_of_each_target(tiny_model: Config) -> None:
    """A target of weight 0 has no effect, as if it were another one."""
    config = override_config(tiny_model, {"dropout": 0.0})
    ids = random_ids(2, 4, 9)
    inputs, targets = ids[..., :-1], ids[..., 1:]
    mask = np.random.default_rng(0).integers(0, 2, inputs.shape).astype(np.float32)
    weights = mx.array(mask * mask.size / mask.sum())
    model = GPT(config.model, 5)
    losses = np.array(token_losses(model(inputs.reshape(8, 8)), targets.reshape(8, 8)))
    expected = float((losses * mask.reshape(8, 8)).sum() / mask.sum())
    gradients = []
    for masked_targets in (targets, mx.where(mx.array(mask) > 0, targets, (targets + 1) % 19)):
        step = TrainStep(GPT(config.model, 5), config)
        batch = Batch(inputs, masked_targets, weights)
        loss, tree = step.compute_gradients(batch, mx.random.key(0))
        assert float(loss) == pytest.approx(expected, abs=1e-5)
        gradients.append({name: np.array(value) for name, value in tree.items()})
    for name, value in gradients[0].items():
        np.testing.assert_array_equal(value, gradients[1][name], err_msg=name)


@pytest.mark.parametrize(("checkpointing", "weighted"), [(False, False), (True, True)])
@pytest.mark.parametrize(
    ("A", "B", "size"), [(1, 12, 2), (1, 12, 4), (2, 6, 3), (3, 5, 3), (1, 8, 8)]
)
def test_the_mean_over_all_ranks_matches_the_whole_batch(
    tiny_model: Config, A: int, B: int, size: int, checkpointing: bool, weighted: bool
) -> None:
    config = override_config(tiny_model, {"dropout": 0.0})
    ids = np.array(random_ids(A, B, 9))
    weights = np.random.default_rng(0).random((A, B, 8)).astype(np.float32) if weighted else None
    whole = Batch(ids[..., :-1], ids[..., 1:], weights)

    def gradients(rank: int, size: int) -> tuple[float, dict[str, np.ndarray]]:
        model = GPT(config.model, 5, gradient_checkpointing=checkpointing)
        batch = Batch(
            *(None if a is None else mx.array(select_rank_rows(a, rank, size)) for a in whole)
        )
        loss, tree = TrainStep(model, config).compute_gradients(batch, mx.random.key(3))
        return float(loss), {name: np.array(value) for name, value in tree.items()}

    loss, expected = gradients(0, 1)
    rank_results = [gradients(rank, size) for rank in range(size)]
    assert np.mean([rank_loss for rank_loss, _ in rank_results]) == pytest.approx(loss, rel=1e-5)
    for name, value in expected.items():
        mean = np.mean([tree[name] for _, tree in rank_results], axis=0)
        np.testing.assert_allclose(mean, value, rtol=1e-3, atol=1e-6, err_msg=name)


def test_each_rank_has_a_different_dropout_key(tiny_model: Config) -> None:
    """The key of a rank and step is always the same."""
    tokens = TokenArray(np.arange(500) * 7 % 19, 19)
    config = override_config(tiny_model, {"batch_size": 4})
    groups = [LocalGroup(0, 1), LocalGroup(0, 2), LocalGroup(1, 2)]
    keys = [
        [str(StepInputs(tokens, config, group)(step)[2].tolist()) for step in (0, 1, 0)]
        for group in groups
    ]
    assert all(first == repeated != second for first, second, repeated in keys)
    assert len({first for first, *_ in keys}) == 3


def test_the_gradient_norm_of_a_large_matrix_is_accurate(tiny_model: Config) -> None:
    """MLX's sum of a whole matrix is 0.3% too small on a CPU for 3 million squares."""
    step_function = TrainStep(GPT(tiny_model.model), tiny_model)
    gradient = mx.random.normal((4000, 768), key=mx.random.key(0))
    one = mx.array(1.0)
    _, norm, *_ = step_function._compute_norm_and_scale(one, {"g": gradient}, one, one)
    expected = np.sqrt(np.square(np.array(gradient), dtype=np.float64).sum())
    np.testing.assert_allclose(float(norm), expected, rtol=1e-5)
