"""The device that MLX computes on: name, memory and measured speed."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxgpt.backend import macos, memory_limits
from mlxgpt.config import Config, override_config

# For machines whose GPU should not be used, such as the virtual GPU of GitHub's Macs.
if os.environ.get("MLXGPT_DEVICE") == "cpu":
    mx.set_default_device(mx.cpu)


def on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


def device_type() -> str:
    """`metal`, `cuda` or `cpu`: where MLX computes."""
    if on_cpu():
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def resolve_dtype(config: Config) -> Config:
    """Replace `dtype = "auto"` by this device's dtype, which never depends on a timing."""
    if config.train.dtype != "auto":
        return config
    return override_config(config, {"dtype": "bfloat16" if device_type() == "cuda" else "float32"})


def device_name() -> str:
    """Name of the chip, as the system reports it."""
    info = mx.device_info()
    if device_type() != "cpu":
        return str(info.get("device_name", device_type()))
    if sys.platform == "darwin":  # Python reports "arm" for every chip
        return macos.sysctl("machdep.cpu.brand_string") or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.lru_cache(maxsize=2)
def matmul_peak(dtype: str) -> float:
    """Measured FLOPs per second of a large matrix product: the best of a few, in under a second.
    Training speed is reported as a share of it.
    """
    size = 1024 if device_type() == "cpu" else 4096
    seconds = _time_matmul(size, dtype)
    _release_memory()
    return 2 * size**3 / seconds


def _time_matmul(size: int, dtype: str) -> float:
    a = mx.random.normal((size, size), key=mx.random.key(0)).astype(getattr(mx, dtype))
    mx.eval(a, a @ a)
    best = float("inf")
    deadline = time.perf_counter() + 0.5
    for _ in range(20):
        best = min(best, _time_call(lambda: mx.eval(a @ a)))
        if time.perf_counter() > deadline:
            break
    return best


@functools.cache
def memory_bandwidth() -> float:
    """Measured memory bandwidth in bytes per second: the best of a few sums of two large arrays,
    on a CPU with one thread per core.
    """
    length, repeats = 1 << 24, 8  # 64 MiB each: far beyond any cache
    if device_type() != "cpu":
        seconds = _time_sum(4 * length, repeats)
        _release_memory()
        return 3 * 4 * 4 * length / seconds
    threads = os.cpu_count() or 1
    arrays = [[np.ones(length // threads, np.float32) for _ in range(3)] for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def add_arrays() -> None:
            list(pool.map(lambda buffers: np.add(buffers[0], buffers[1], out=buffers[2]), arrays))

        seconds = min(_time_call(add_arrays) for _ in range(repeats))
    return 3 * 4 * threads * (length // threads) / seconds


def _time_call(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _time_sum(length: int, repeats: int) -> float:
    a, b = mx.ones(length), mx.ones(length)
    mx.eval(a, b, a + b)
    return min(_time_call(lambda: mx.eval(a + b)) for _ in range(repeats))


def _release_memory() -> None:
    """Clear MLX's cache and reset its peak memory, so that the arrays of a measurement do not count
    in the next one.
    """
    mx.synchronize()  # a GPU holds arrays until its work is done
    mx.clear_cache()
    mx.reset_peak_memory()


def has_full_precision_matmul() -> bool:
    """Whether float32 matrix products have full precision. An M5's GPU and CUDA first round the
    inputs to TF32 (10-bit mantissa), unless MLX_ENABLE_TF32=0 is set.
    """
    value = 1 + 2.0**-12  # TF32 rounds it to 1
    product = mx.full((256, 256), value) @ mx.eye(256)
    return bool((product == value).all())


def memory_in_use() -> tuple[int, str]:
    """Bytes in use and their kind: "MLX" (arrays and cache) on a GPU, "resident" on a CPU."""
    if device_type() != "cpu":
        return mx.get_active_memory() + mx.get_cache_memory(), "MLX"
    return resident_bytes(), "resident"


def reset_peak_memory() -> None:
    """Reset the peak of `peak_memory_bytes`, if the system supports it."""
    if device_type() != "cpu":
        mx.reset_peak_memory()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Peak bytes in use since `reset_peak_memory`: MLX's on a GPU, resident memory on a CPU."""
    if device_type() != "cpu":
        return mx.get_peak_memory()
    # Preferred to `ru_maxrss`, which a child process inherits from its parent on Linux.
    return _read_proc_bytes("/proc/self/status", "VmHWM") or _peak_resident_bytes()


def total_memory_bytes() -> int:
    """Total memory in bytes: the GPU's, or on a CPU the machine's or container's."""
    if device_type() != "cpu":
        info = mx.device_info()
        return int(info.get("memory_size") or info.get("total_memory") or 1 << 62)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(limit.total for limit in memory_limits.memory_limits())])


def free_memory_bytes() -> int:
    """Bytes of memory that a training run may use: the amount that the system recommends or has
    available, if it reports that, else all memory; limited by the container.
    """
    if device_type() == "metal":
        return int(mx.device_info()["max_recommended_working_set_size"])
    if device_type() == "cpu" and (available := _read_proc_bytes("/proc/meminfo", "MemAvailable")):
        free = available + resident_bytes()
        return min([free, *(limit.free for limit in memory_limits.memory_limits())])
    return total_memory_bytes()


MAX_BATCH_FLOPS = 2e12  # FLOPs; estimated to take a small Apple GPU one second


def max_rows_per_batch(flops: float) -> int | None:
    """Maximum number of sequences of `flops` FLOPs per batch on a Mac's GPU; None: no maximum.
    macOS aborts GPU commands that block the display for too long.
    """
    return max(1, int(MAX_BATCH_FLOPS / flops)) if device_type() == "metal" else None


def limit_memory(limit: int | None = None) -> None:
    """Set MLX's memory limit, which includes the cache of freed buffers: Metal and CUDA evict the
    oldest ones before an allocation would exceed it (`malloc` in MLX's allocators). The cache has
    no smaller limit, because each step would then return buffers to the system and wait for the
    same memory, zeroed. On a CPU, the cache holds at most 32 MB, MLX's default.

    Args:
        limit: bytes; default: on a Mac, the system's recommendation (MLX's default is 1.5 times
            that, and the Mac would swap, since GPU and CPU share the memory); elsewhere MLX's.
    """
    if limit is None and device_type() == "metal":
        limit = free_memory_bytes()
    if limit is not None:
        mx.set_memory_limit(limit)


def resident_bytes() -> int:
    """Resident memory of this process in bytes; its peak if the system reports only that."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except OSError:
        return _peak_resident_bytes()


def _read_proc_bytes(file: str, name: str) -> int | None:
    """A field of a /proc file in bytes; None if it does not exist."""
    return memory_limits.read_fields(Path(file)).get(f"{name}:")


def _peak_resident_bytes() -> int:
    max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max_rss if sys.platform == "darwin" else max_rss * 1024
