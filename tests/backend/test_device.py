from __future__ import annotations

import gc
import platform
import subprocess
import sys

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.backend import device, macos, memory_limits
from mlxgpt.config import Config, override_config


def test_matmul_peak_is_plausible_and_measured_once() -> None:
    peak = device.matmul_peak("float32")
    assert 1e8 < peak < 1e16
    assert device.matmul_peak("float32") == peak, "measured once"


def test_default_dtype_depends_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for backend, dtype in (("cpu", "float32"), ("metal", "float32"), ("cuda", "bfloat16")):
        monkeypatch.setattr(device, "device_type", lambda backend=backend: backend)
        assert device.resolve_dtype(Config()).train.dtype == dtype
        bfloat16 = override_config(Config(), {"dtype": "bfloat16"})
        assert device.resolve_dtype(bfloat16) == bfloat16


def test_benchmarks_free_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither active, nor in MLX's cache, nor in the peak memory of a later training run."""
    gc.collect()
    before = mx.get_active_memory()
    device.matmul_peak.__wrapped__("float32")
    assert mx.get_cache_memory() == 0
    assert mx.get_peak_memory() < 1_000_000
    monkeypatch.setattr(device, "device_type", lambda: "metal")  # measures with large MLX arrays
    active_bytes: list[int] = []
    clear_cache = mx.clear_cache

    def clear() -> None:
        active_bytes.append(mx.get_active_memory())
        clear_cache()

    monkeypatch.setattr(mx, "clear_cache", clear)
    device.memory_bandwidth.__wrapped__()
    assert active_bytes == [before], "the arrays were let go first"
    assert mx.get_cache_memory() == 0
    assert mx.get_peak_memory() < 1_000_000


@pytest.mark.skipif(not device.on_cpu(), reason="GPU memory is not resident memory")
def test_memory_use_of_this_process() -> None:
    code = (  # in a new process, which has no freed pages to reuse
        "import mlxgpt, mlx.core as mx\n"
        "from mlxgpt.backend import device\n"
        "before = device.resident_bytes()\n"
        "held = mx.ones((5000, 5000))\n"
        "mx.eval(held)\n"
        "assert 20e6 < before < 100e9\n"
        "assert device.resident_bytes() - before > 50e6\n"
        "assert device.memory_in_use()[0] > 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_bandwidth_is_plausible() -> None:
    assert 1e9 < device.memory_bandwidth() < 10e12


def test_free_memory_includes_memory_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "device_type", lambda: "cpu")
    monkeypatch.setattr(device, "_read_proc_bytes", lambda file, name: 5_000_000_000)
    monkeypatch.setattr(device, "resident_bytes", lambda: 1_000_000_000)
    monkeypatch.setattr(memory_limits, "memory_limits", list)
    assert device.free_memory_bytes() == 6_000_000_000


def test_device_name_of_a_mac_is_the_full_chip_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's `platform.processor()` is "arm" on a Mac."""
    monkeypatch.setattr(device, "device_type", lambda: "cpu")
    monkeypatch.setattr(sys, "platform", "darwin")
    names = {"machdep.cpu.brand_string": "Apple M4 Pro"}
    monkeypatch.setattr(macos, "sysctl", lambda name: names.get(name, ""))
    assert device.device_name() == "Apple M4 Pro"
    names.clear()
    assert device.device_name() == platform.machine()


def test_device_has_a_name_and_type() -> None:
    assert device.device_name()
    assert device.device_type() in ("cpu", "cuda", "metal")


def test_memory_limit_on_a_mac_is_the_recommended_size(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, int] = {}
    monkeypatch.setattr(mx, "set_memory_limit", lambda size: limits.update(memory=size))
    monkeypatch.setattr(mx, "set_cache_limit", lambda size: limits.update(cache=size))
    monkeypatch.setattr(device, "device_type", lambda: "cpu")
    device.limit_memory()
    assert limits == {}, "elsewhere nothing is limited"
    monkeypatch.setattr(device, "device_type", lambda: "metal")
    info = {"max_recommended_working_set_size": 12_000_000_000, "memory_size": 16_000_000_000}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    device.limit_memory()
    assert limits == {"memory": 12_000_000_000}
    device.limit_memory(5_000_000_000)
    assert limits == {"memory": 5_000_000_000}, "the cache counts towards it"


class Allocator:
    """MLX's Metal allocator (allocator.cpp, buffer_cache.h), in MB with 1 MB pages."""

    def __init__(self, recommended: int) -> None:
        self.recommended = recommended
        self.memory = self.cache_limit = 3 * recommended // 2
        self.active = self.allocated = self.peak = 0
        self.cached: list[int] = []  # newest last

    def malloc(self, size: int) -> int:
        candidates = [s for s in self.cached if size <= s < min(2 * size, size + 2)]
        if candidates:
            self.cached.remove(min(candidates))
        else:
            limit = min(self.memory, 95 * self.recommended // 100)
            self.release(self.active + sum(self.cached) + size - limit)
            self.allocated += size
        buffer = min(candidates, default=size)
        self.active += buffer
        self.release(sum(self.cached) - self.cache_limit)
        self.peak = max(self.peak, self.active + sum(self.cached))
        return buffer

    def release(self, excess: int) -> None:
        while self.cached and excess > 0:
            excess -= self.cached.pop(0)

    def free(self, size: int) -> None:
        self.active -= size
        if sum(self.cached) < self.cache_limit:
            self.cached.append(size)


@given(
    weights=st.integers(0, 3000),
    step=st.lists(st.integers(1, 2000), min_size=1, max_size=20),
    evaluation=st.lists(st.integers(1, 2000), max_size=20),
)
def test_step_that_fits_allocates_no_new_memory(
    weights: int, step: list[int], evaluation: list[int]
) -> None:
    """Later steps reuse cached buffers; other cached buffers are freed before the limit."""
    metal = Allocator(recommended=5_300)  # an 8 GB Mac
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "device_type", lambda: "metal")
        info = {"max_recommended_working_set_size": metal.recommended}
        patch.setattr(mx, "device_info", lambda: info)
        patch.setattr(mx, "set_memory_limit", lambda size: setattr(metal, "memory", size))
        patch.setattr(mx, "set_cache_limit", lambda size: setattr(metal, "cache_limit", size))
        device.limit_memory()
    metal.malloc(weights)
    peaks = []
    for sizes in (step, step, step, evaluation):
        before = metal.allocated
        buffers = [metal.malloc(size) for size in sizes]
        peaks.append(metal.active)
        for size in buffers:
            metal.free(size)
        if len(peaks) in (2, 3) and peaks[0] < 95 * metal.recommended // 100:
            assert metal.allocated == before
    assert metal.peak <= max(*peaks, 95 * metal.recommended // 100)
