"""The self-check passes on correct code, and each check fails on broken code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxgpt.backend import device, ops
from mlxgpt.config import Config, SamplingParams, override_config, toml
from mlxgpt.data.token_array import Batch, TokenArray
from mlxgpt.evaluation.loss import Evaluation, Evaluator
from mlxgpt.inference import sampling
from mlxgpt.model import gpt, init_weights
from mlxgpt.model.gpt import GPT, Linear
from mlxgpt.model.kv_cache import KVCache, LayersKV
from mlxgpt.training import full_size_check, selfcheck, step
from mlxgpt.training.full_size_check import CheckResult
from tests.helpers.tf32 import round_matmul_inputs

Patch = pytest.MonkeyPatch
on_cpu = pytest.mark.skipif(device.device_type() != "cpu", reason="a GPU may add in another order")


@pytest.fixture(scope="module")
def small_config(tiny_model: Config) -> Config:
    return selfcheck.shrink_config(
        override_config(tiny_model, {"vocab_size": 60, "learning_rate": 1e-3})
    )


def test_a_correct_model_passes_all_checks(tiny: Config) -> None:
    checks = list(selfcheck.run_self_check(tiny))
    assert [check for check in checks if check.ok is False] == []
    assert len({check.name for check in checks}) == (13 if device.on_cpu() else 15)
    assert all(check.detail for check in checks)


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": False, "dropout": 0.0},
        {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 2},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 3},
        {"vocab_size": 50257, "n_head": 3, "n_embd": 48},
        {"dtype": "bfloat16"},
        {"learning_rate": 1e3},  # the self-check does not judge hyperparameters
    ],
)
def test_correct_models_of_all_kinds_pass(tiny: Config, settings: dict[str, object]) -> None:
    checks = selfcheck.run_self_check(override_config(tiny, settings))
    assert [check for check in checks if check.ok is False] == []


@on_cpu
def test_inapplicable_checks_are_skipped(tiny: Config, monkeypatch: Patch) -> None:
    skipped = [check.name for check in selfcheck.run_self_check(tiny) if check.ok is None]
    assert skipped == ["matrix products", "fused kernels"]
    small_config = selfcheck.shrink_config(override_config(tiny, {"vocab_size": 60}))
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    assert selfcheck.check_repeatability(small_config).ok is None, "a GPU may add in another order"


def test_the_initial_loss_is_explained(tiny: Config) -> None:
    check = full_size_check.check_initial_loss(override_config(tiny, {"vocab_size": 65}))
    assert "ln 65 = 4.174" in check.detail
    assert "the same probability" in check.why


WIDE = {"n_layer": 1, "n_head": 1, "block_size": 32}
MODERN = {"tied": False, "position": "rope", "norm": "rms", "mlp": "swiglu", "bias": False}


@pytest.mark.parametrize("settings", [{}, MODERN])
@pytest.mark.parametrize(
    ("vocab_size", "n_embd"),
    [(2, 16), (2, 144), (7, 144), (18, 768), (65, 1280), (4096, 64)],
)
def test_initial_loss_check_for_all_sizes(
    tiny_model: Config,
    monkeypatch: Patch,
    vocab_size: int,
    n_embd: int,
    settings: dict[str, object],
) -> None:
    size = {"vocab_size": vocab_size, "n_embd": n_embd}
    config = override_config(tiny_model, WIDE | size | settings)
    healthy = full_size_check.check_initial_loss(config)
    assert healthy.ok, healthy.detail
    with monkeypatch.context() as patch:
        scale_weights_tenfold(patch)
        assert full_size_check.check_initial_loss(config).ok is False
    if config.model.tied:  # with an untied head, a leaked target does not change the initial loss
        leak_target(monkeypatch)
        assert full_size_check.check_initial_loss(config).ok is False


def scale_weights_tenfold(patch: Patch) -> None:
    real = gpt.init_parameters
    patch.setattr(
        gpt,
        "init_parameters",
        lambda *given: tree_map(lambda p: 10 * p if p.ndim > 1 else p, real(*given)),
    )


def leak_target(patch: Patch) -> None:
    real = GPT.__call__
    patch.setattr(GPT, "__call__", lambda self, ids: real(self, mx.roll(ids, -1, 1)))


@pytest.mark.parametrize("vocab_size", [2, 4, 65])
def test_the_expected_loss_is_close_to_the_mean_of_many_seeds(
    tiny_model: Config, vocab_size: int
) -> None:
    size = {"n_embd": 144, "block_size": 64, "vocab_size": vocab_size}
    results = [
        full_size_check.check_initial_loss(
            override_config(tiny_model, size | {"seed": seed})
        ).detail.split()
        for seed in range(8)
    ]
    measured = np.mean([float(words[0]) for words in results]) - math.log(vocab_size)
    expected = float(results[0][-1]) - math.log(vocab_size)
    assert 0.5 < measured / expected < 1.5


def untie_head(patch: Patch) -> None:
    """Add an output head that starts with the embedding's weights, and differs after one update."""
    real = GPT.__init__

    def with_head(self: GPT, *args: object, **kwargs: object) -> None:
        real(self, *args, **kwargs)  # type: ignore[arg-type]
        self.lm_head = Linear(self.config.n_embd, self.config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def call(self: GPT, ids: mx.array, key: mx.array | None = None) -> mx.array:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x, None, key)
        return self.lm_head(self.ln_f(x))

    patch.setattr(GPT, "__init__", with_head)
    patch.setattr(GPT, "__call__", call)


def unmask_attention(patch: Patch) -> None:
    def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)

    patch.setattr(ops, "causal_attention", attention)


def enlarge_weights(patch: Patch) -> None:
    patch.setattr(init_weights, "INIT_STD", 0.5)


def make_infinite(patch: Patch) -> None:
    patch.setattr(ops, "gelu", lambda x, gradient=True: x / 0)


def freeze_mask(patch: Patch) -> None:
    """Make the compiled step always use the same dropout mask, unlike the eager step."""
    real = step.TrainStep.__init__

    def init(self: step.TrainStep, *args: object, **kwargs: object) -> None:
        real(self, *args, **kwargs)  # type: ignore[arg-type]
        if kwargs.get("compiled", True):
            sum_gradients = self._sum_gradients
            frozen = mx.random.key(1)
            patch.setattr(self, "_sum_gradients", lambda batch, key: sum_gradients(batch, frozen))

    patch.setattr(step.TrainStep, "__init__", init)


def repeat_micro_batch(patch: Patch) -> None:
    real = TokenArray.get_batch

    def batch(self: TokenArray, *args: int, **kwargs: int) -> Batch:
        inputs, targets, *_ = real(self, *args, **kwargs)
        return Batch(np.stack([inputs[0]] * len(inputs)), np.stack([targets[0]] * len(targets)))

    patch.setattr(TokenArray, "get_batch", batch)


def sum_losses(patch: Patch) -> None:
    """Use sums of losses instead of means in micro-batches."""
    real = step.training_losses
    patch.setattr(step, "training_losses", lambda *args: real(*args) * args[1].shape[0])


def misplace_cache(patch: Patch) -> None:
    init = KVCache.__init__

    def misplaced(
        self: KVCache, layers: LayersKV = (), position: Any = None, **kwargs: Any
    ) -> None:
        init(self, layers, None if position is None else position - 1, **kwargs)

    patch.setattr(KVCache, "__init__", misplaced)


def invert_top_k(patch: Patch) -> None:
    patch.setattr(
        sampling, "top_k", lambda x, k: mx.where(x < mx.topk(x, k).min(), x, float("-inf"))
    )


def unsort_top_k(patch: Patch) -> None:
    """Take the last value of mx.topk for the k-th largest, although its result is not sorted."""
    patch.setattr(
        sampling, "top_k", lambda x, k: mx.where(x >= mx.topk(x, k)[..., -1:], x, float("-inf"))
    )


def sample_from_probabilities(patch: Patch) -> None:
    real = sampling.categorical
    patch.setattr(sampling, "categorical", lambda x, keys: real(mx.softmax(x, axis=-1), keys))


def train_in_evaluation(patch: Patch) -> None:
    real = Evaluator.__call__

    def call(self: Evaluator) -> Evaluation:
        result = real(self)
        models[0].wte.weight = models[0].wte.weight + 1e-6
        return result

    init = Evaluator.__init__
    models: list[GPT] = []

    def remember(self: Evaluator, gpt: GPT, *args: object, **kwargs: object) -> None:
        models.append(gpt)
        init(self, gpt, *args, **kwargs)  # type: ignore[arg-type]

    patch.setattr(Evaluator, "__init__", remember)
    patch.setattr(Evaluator, "__call__", call)


def stop_gradient(patch: Patch) -> None:
    real = step.training_losses
    patch.setattr(step, "training_losses", lambda *args: mx.stop_gradient(real(*args)))


def make_unrepeatable(patch: Patch) -> None:
    draws = iter(range(1000))
    patch.setattr(mx.random, "key", lambda n, real=mx.random.key: real(n + next(draws)))


def test_an_untied_head_has_no_tied_head_check(tiny_model: Config) -> None:
    untied = override_config(tiny_model, {"tied": False, "value_embeddings": True})
    checks = list(selfcheck.run_self_check(untied))
    assert all(check.ok is not False for check in checks)
    assert "tied head" not in {check.name for check in checks}


@pytest.mark.parametrize(
    ("check", "broken_by"),
    [
        (selfcheck.check_tied_head, untie_head),
        (selfcheck.check_causality, unmask_attention),
        (full_size_check.check_initial_loss, enlarge_weights),
        (full_size_check.check_full_size_step, make_infinite),
        (selfcheck.check_compiled_step, freeze_mask),
        (selfcheck.check_micro_batches, repeat_micro_batch),
        (selfcheck.check_micro_batches, sum_losses),
        (full_size_check.check_cached_logits, misplace_cache),
        (selfcheck.check_sampler, invert_top_k),
        (selfcheck.check_sampler, unsort_top_k),
        (selfcheck.check_sampler, sample_from_probabilities),
        (selfcheck.check_evaluation_side_effects, train_in_evaluation),
        (selfcheck.check_overfitting, stop_gradient),
        (selfcheck.check_repeatability, make_unrepeatable),
    ],
)
def test_each_check_fails_on_broken_code(
    small_config: Config,
    monkeypatch: Patch,
    check: Callable[[Config], CheckResult],
    broken_by: Callable[[Patch], None],
) -> None:
    assert check(small_config).ok
    broken_by(monkeypatch)
    broken = check(small_config)
    assert broken.ok is False, broken.detail


@pytest.fixture
def tf32(monkeypatch: Patch) -> None:
    round_matmul_inputs(monkeypatch)


def test_matmul_has_full_float32_precision_in_tests() -> None:
    assert device.has_full_precision_matmul()


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_a_device_with_tf32_passes(recipe: str, monkeypatch: Patch) -> None:
    config = toml.load_tier_config(1, recipe)
    assert not device.has_full_precision_matmul()
    results = list(selfcheck.run_self_check(config))
    assert [check.name for check in results if check.ok is False] == []
    assert results[0].detail.endswith("rounded to TF32")
    small_config = selfcheck.shrink_config(override_config(config, {"vocab_size": 65}))
    for check, break_check in (
        (full_size_check.check_cached_logits, misplace_cache),
        (selfcheck.check_micro_batches, sum_losses),
    ):
        with monkeypatch.context() as patch:
            break_check(patch)
            assert check(small_config).ok is False, "what is broken is seen there too"


def test_sampling_is_checked_with_every_filter(small_config: Config, monkeypatch: Patch) -> None:
    for name in ("top_k", "top_p", "min_p"):
        with monkeypatch.context() as patch:
            patch.setattr(sampling, name, lambda logits, n: logits)
            assert not selfcheck.check_sampler(small_config).ok, name
    pack_params = selfcheck.pack_sampling_params

    def without_temperature(settings: SamplingParams) -> mx.array:
        return mx.concatenate([mx.ones(1), pack_params(settings)[1:]])

    monkeypatch.setattr(selfcheck, "pack_sampling_params", without_temperature)
    assert not selfcheck.check_sampler(small_config).ok
