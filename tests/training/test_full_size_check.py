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
from tests.helpers.tf32 import round_matmul_inputs

Patch = pytest.MonkeyPatch
IsBroken = Callable[[], bool]  # whether what is computed now is to be wrong

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


def make_config(**settings: Any) -> Config:
    """Heads of 64 values, and as many of them as the CPU's own kernels need to take part."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 32, "vocab_size": 65}
    config = config_from_tree({"model": shape, "train": {"dtype": "float32", "seed": 1}})
    return override_config(config, settings)


class GpuState:
    """What is being computed: the reference, which is right; or the evaluation."""

    reference = False
    evaluation = False


@pytest.fixture
def gpu(monkeypatch: Patch) -> Iterator[GpuState]:
    """MLX's own kernels, except for what is computed on the CPU to compare with."""
    gpu = GpuState()
    original_use_cpu, make_eval_step = full_size_check.use_cpu, full_size_check.make_eval_step

    @contextmanager
    def use_cpu_and_record() -> Iterator[None]:
        with original_use_cpu():
            gpu.reference = True
            yield
            gpu.reference = False

    def make_recording_eval_step(*args: Any) -> Callable[..., mx.array]:
        step = make_eval_step(*args)

        def evaluate(*args: Any) -> mx.array:
            gpu.evaluation = True
            loss = step(*args)
            mx.eval(loss)
            gpu.evaluation = False
            return loss

        return evaluate

    monkeypatch.setattr(full_size_check, "use_cpu", use_cpu_and_record)
    monkeypatch.setattr(full_size_check, "make_eval_step", make_recording_eval_step)
    monkeypatch.setattr(device, "on_cpu", lambda: gpu.reference)
    mx.disable_compile()  # what is compiled takes long to compile, and is no other formula
    yield gpu
    mx.enable_compile()


@pytest.fixture(params=["float32", "TF32", "bfloat16"])
def dtype(request: pytest.FixtureRequest, gpu: GpuState, monkeypatch: Patch) -> str:
    if request.param == "TF32":
        round_matmul_inputs(monkeypatch, lambda: not gpu.reference)
    return "bfloat16" if request.param == "bfloat16" else "float32"


@pytest.mark.parametrize("settings", [{}, MODERN], ids=["classic", "modern"])
@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_model_passes(
    check: Callable[[Config], CheckResult], settings: dict[str, Any], dtype: str
) -> None:
    result = check(make_config(**settings, dtype=dtype))
    assert result.ok, result.detail


def patch_attention(patch: Patch, is_broken: IsBroken, **changes: Callable[..., Any]) -> None:
    original = mx.fast.scaled_dot_product_attention

    def attention(q: mx.array, k: mx.array, v: mx.array, **kwargs: Any) -> mx.array:
        if is_broken():
            kwargs |= {name: change(kwargs[name], k) for name, change in changes.items()}
        return original(q, k, v, **kwargs)

    patch.setattr(mx.fast, "scaled_dot_product_attention", attention)


def break_head_scale(patch: Patch, is_broken: IsBroken) -> None:
    """1 / D instead of 1 / √D."""
    patch_attention(patch, is_broken, scale=lambda scale, k: scale**2)


def break_mask(patch: Patch, is_broken: IsBroken) -> None:
    """One token ahead is seen, or all that the cache has room for."""

    def look_ahead(mask: Any, k: mx.array) -> mx.array:
        if not isinstance(mask, str):
            return mx.ones_like(mask)
        positions = mx.arange(k.shape[2])
        return positions[:, None] + 1 >= positions

    patch_attention(patch, is_broken, mask=look_ahead)


def is_decoding(args: tuple[Any, ...]) -> bool:
    """Whether a forward pass is one of single tokens after those in a cache."""
    return len(args) == 2 and args[1].position is not None


def shift_positions(patch: Patch, is_broken: IsBroken) -> None:
    """Positions are one off: those of a whole sequence, or of a token that is decoded."""
    call, init = GPT.__call__, KVCache.__init__

    def call_shifted(self: GPT, *args: Any, **kwargs: Any) -> mx.array:
        if not is_broken() or is_decoding(args):
            return call(self, *args, **kwargs)
        weight = self.wpe.weight
        self.wpe.weight = mx.roll(weight, 1, 0)
        logits = call(self, *args, **kwargs)
        self.wpe.weight = weight
        return logits

    def init_shifted(
        self: KVCache, layers: LayersKV = (), position: Any = None, **kwargs: Any
    ) -> None:
        init(self, layers, None if position is None else position - 1, **kwargs)

    patch.setattr(GPT, "__call__", call_shifted)
    patch.setattr(KVCache, "__init__", init_shifted)


@pytest.mark.parametrize("break_it", [break_head_scale, break_mask, shift_positions])
@pytest.mark.parametrize("check", CHECKS)
def test_what_is_wrong_is_seen(
    check: Callable[[Config], CheckResult],
    break_it: Callable[[Patch, IsBroken], None],
    dtype: str,
    gpu: GpuState,
    monkeypatch: Patch,
) -> None:
    broken_phases: dict[Any, IsBroken] = {
        full_size_check.check_against_cpu: lambda: not gpu.reference,
        full_size_check.check_evaluation_loss: lambda: gpu.evaluation,
        full_size_check.check_cached_logits: lambda: decoding,
    }
    decoding = False
    call = GPT.__call__

    def call_and_record(self: GPT, *args: Any, **kwargs: Any) -> Any:
        nonlocal decoding
        decoding = is_decoding(args)
        result = call(self, *args, **kwargs)
        decoding = False
        return result

    monkeypatch.setattr(GPT, "__call__", call_and_record)
    break_it(monkeypatch, broken_phases[check])
    check_result = check(make_config(dtype=dtype))
    assert check_result.ok is False, check_result.detail


def test_rotary_positions_of_single_tokens_are_checked(gpu: GpuState, monkeypatch: Patch) -> None:
    shift_positions(monkeypatch, lambda: False)
    assert full_size_check.check_cached_logits(make_config(**MODERN)).ok is False


def test_a_gpu_is_checked_at_full_size(gpu: GpuState) -> None:
    names = [check.name for check in selfcheck.run_self_check(make_config(n_layer=1))]
    assert names[4:7] == [
        "GPU matches CPU",
        "evaluation matches training",
        "KV cache matches full pass",
    ]
    assert len(names) == len(set(names)), "nothing is checked twice"


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_shortest_blocks_can_be_checked(block_size: int, gpu: GpuState) -> None:
    for check in CHECKS:
        result = check(make_config(block_size=block_size))
        assert result.ok, result.detail
