"""What is compared at full size on a GPU: run here as if the CPU were one, with MLX's own kernels
for it and the CPU's for the reference. Sound models pass, with their numbers rounded as on any GPU;
each check fails when what it runs is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest

from mlxgpt.backend import device
from mlxgpt.config import Config, config_from_tree, override_config
from mlxgpt.model.gpt import GPT
from mlxgpt.model.kv_cache import KVCache, LayersKV
from mlxgpt.training import full_size_check, selfcheck
from mlxgpt.training.full_size_check import CheckResult
from tests.helpers.tf32 import round_products

Patch = pytest.MonkeyPatch
Wrong = Callable[[], bool]  # whether what is computed now is to be wrong

MODERN = {
    "position": "rope",
    "norm": "rms",
    "qk_norm": True,
    "mlp": "swiglu",
    "bias": False,
    "tied": False,
}
CHECKS = [
    full_size_check.check_against_cpu,
    full_size_check.check_evaluation_loss,
    full_size_check.check_cached_logits,
]


def model(**settings: Any) -> Config:
    """Heads of 64 values, and as many of them as the CPU's own kernels need to take part."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 32, "vocab_size": 65}
    config = config_from_tree({"model": shape, "train": {"dtype": "float32", "seed": 1}})
    return override_config(config, settings)


class Gpu:
    """What is being computed: the reference, which is right; or the evaluation."""

    reference = False
    evaluation = False


@pytest.fixture
def gpu(monkeypatch: Patch) -> Iterator[Gpu]:
    """MLX's own kernels, except for what is computed on the CPU to compare with."""
    gpu = Gpu()
    the_cpu, make_eval_step = full_size_check.use_cpu, full_size_check.make_eval_step

    @contextmanager
    def reference() -> Iterator[None]:
        with the_cpu():
            gpu.reference = True
            yield
            gpu.reference = False

    def evaluating(*args: Any) -> Callable[..., mx.array]:
        step = make_eval_step(*args)

        def evaluate(*args: Any) -> mx.array:
            gpu.evaluation = True
            loss = step(*args)
            mx.eval(loss)
            gpu.evaluation = False
            return loss

        return evaluate

    monkeypatch.setattr(full_size_check, "use_cpu", reference)
    monkeypatch.setattr(full_size_check, "make_eval_step", evaluating)
    monkeypatch.setattr(device, "on_cpu", lambda: gpu.reference)
    mx.disable_compile()  # what is compiled takes long to compile, and is no other formula
    yield gpu
    mx.enable_compile()


@pytest.fixture(params=["float32", "TF32", "bfloat16"])
def dtype(request: pytest.FixtureRequest, gpu: Gpu, monkeypatch: Patch) -> str:
    if request.param == "TF32":
        round_products(monkeypatch, lambda: not gpu.reference)
    return "bfloat16" if request.param == "bfloat16" else "float32"


@pytest.mark.parametrize("settings", [{}, MODERN], ids=["classic", "modern"])
@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_model_passes(
    check: Callable[[Config], CheckResult], settings: dict[str, Any], dtype: str
) -> None:
    found = check(model(**settings, dtype=dtype))
    assert found.ok, found.detail


def attention_with(patch: Patch, wrong: Wrong, **changed: Callable[..., Any]) -> None:
    real = mx.fast.scaled_dot_product_attention

    def attention(q: mx.array, k: mx.array, v: mx.array, **given: Any) -> mx.array:
        if wrong():
            given |= {name: change(given[name], k) for name, change in changed.items()}
        return real(q, k, v, **given)

    patch.setattr(mx.fast, "scaled_dot_product_attention", attention)


def head_scale(patch: Patch, wrong: Wrong) -> None:
    """1 / D instead of 1 / √D."""
    attention_with(patch, wrong, scale=lambda scale, k: scale**2)


def mask(patch: Patch, wrong: Wrong) -> None:
    """One token ahead is seen, or all that the cache has room for."""

    def ahead(mask: Any, k: mx.array) -> mx.array:
        if not isinstance(mask, str):
            return mx.ones_like(mask)
        places = mx.arange(k.shape[2])
        return places[:, None] + 1 >= places

    attention_with(patch, wrong, mask=ahead)


def decodes(args: tuple[Any, ...]) -> bool:
    """Whether a forward pass is one of single tokens after those in a cache."""
    return len(args) == 2 and args[1].position is not None


def position(patch: Patch, wrong: Wrong) -> None:
    """Positions are one off: those of a whole sequence, or of a token that is decoded."""
    call, init = GPT.__call__, KVCache.__init__

    def shifted(self: GPT, *args: Any, **rest: Any) -> mx.array:
        if not wrong() or decodes(args):
            return call(self, *args, **rest)
        own = self.wpe.weight
        self.wpe.weight = mx.roll(own, 1, 0)
        logits = call(self, *args, **rest)
        self.wpe.weight = own
        return logits

    def one_off(self: KVCache, layers: LayersKV = (), at: Any = None, **rest: Any) -> None:
        init(self, layers, None if at is None else at - 1, **rest)

    patch.setattr(GPT, "__call__", shifted)
    patch.setattr(KVCache, "__init__", one_off)


@pytest.mark.parametrize("break_it", [head_scale, mask, position])
@pytest.mark.parametrize("check", CHECKS)
def test_what_is_wrong_is_seen(
    check: Callable[[Config], CheckResult],
    break_it: Callable[[Patch, Wrong], None],
    dtype: str,
    gpu: Gpu,
    monkeypatch: Patch,
) -> None:
    wrong: dict[Any, Wrong] = {
        full_size_check.check_against_cpu: lambda: not gpu.reference,
        full_size_check.check_evaluation_loss: lambda: gpu.evaluation,
        full_size_check.check_cached_logits: lambda: decoding,
    }
    decoding = False
    call = GPT.__call__

    def called(self: GPT, *args: Any, **rest: Any) -> Any:
        nonlocal decoding
        decoding = decodes(args)
        result = call(self, *args, **rest)
        decoding = False
        return result

    monkeypatch.setattr(GPT, "__call__", called)
    break_it(monkeypatch, wrong[check])
    found = check(model(dtype=dtype))
    assert found.ok is False, found.detail


def test_rotary_positions_of_single_tokens_are_checked(gpu: Gpu, monkeypatch: Patch) -> None:
    position(monkeypatch, lambda: False)
    assert full_size_check.check_cached_logits(model(**MODERN)).ok is False


def test_a_gpu_is_checked_at_full_size(gpu: Gpu) -> None:
    names = [check.name for check in selfcheck.run_self_check(model(n_layer=1))]
    assert names[4:7] == ["GPU = CPU", "evaluation = training", "cached = uncached"]
    assert len(names) == len(set(names)), "nothing is checked twice"


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_shortest_blocks_can_be_checked(block_size: int, gpu: Gpu) -> None:
    for check in CHECKS:
        found = check(model(block_size=block_size))
        assert found.ok, found.detail
