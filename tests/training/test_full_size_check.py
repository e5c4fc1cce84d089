"""The full-size checks of a GPU, simulated on the CPU: MLX's kernels take the place of the GPU, and
the CPU kernels are the reference. Correct models pass, also with GPU-like rounding, and each check
fails on broken code.
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
IsBroken = Callable[[], bool]  # whether the current computation should be wrong

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
    """A small model with head size 64, large enough for the CPU kernels to be used."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 32, "vocab_size": 65}
    config = config_from_tree({"model": shape, "train": {"dtype": "float32", "seed": 1}})
    return override_config(config, settings)


class GpuState:
    """What is being computed: the reference, which is never broken, or the evaluation."""

    reference = False
    evaluation = False


@pytest.fixture
def gpu(monkeypatch: Patch) -> Iterator[GpuState]:
    """MLX's kernels for everything except the reference on the CPU."""
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
    mx.disable_compile()  # compilation is slow and does not change the formulas
    yield gpu
    mx.enable_compile()


@pytest.fixture(params=["float32", "TF32", "bfloat16"])
def dtype(request: pytest.FixtureRequest, gpu: GpuState, monkeypatch: Patch) -> str:
    if request.param == "TF32":
        round_matmul_inputs(monkeypatch, lambda: not gpu.reference)
    return "bfloat16" if request.param == "bfloat16" else "float32"


@pytest.mark.parametrize("settings", [{}, MODERN], ids=["classic", "modern"])
@pytest.mark.parametrize("check", CHECKS)
def test_a_correct_model_passes(
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
    """Scale attention by 1 / D instead of 1 / √D."""
    patch_attention(patch, is_broken, scale=lambda scale, k: scale**2)


def break_mask(patch: Patch, is_broken: IsBroken) -> None:
    """Let attention see one token ahead, or the whole capacity of the cache."""

    def look_ahead(mask: Any, k: mx.array) -> mx.array:
        if not isinstance(mask, str):
            return mx.ones_like(mask)
        positions = mx.arange(k.shape[2])
        return positions[:, None] + 1 >= positions

    patch_attention(patch, is_broken, mask=look_ahead)


def is_decoding(args: tuple[Any, ...]) -> bool:
    """Whether a forward pass decodes single tokens with a filled cache."""
    return len(args) == 2 and args[1].position is not None


def shift_positions(patch: Patch, is_broken: IsBroken) -> None:
    """Shift positions by one, in full passes and in decoding."""
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
def test_broken_code_is_detected(
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


def test_rotary_positions_are_checked_in_decoding(gpu: GpuState, monkeypatch: Patch) -> None:
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
def test_the_smallest_block_sizes_can_be_checked(block_size: int, gpu: GpuState) -> None:
    for check in CHECKS:
        result = check(make_config(block_size=block_size))
        assert result.ok, result.detail
