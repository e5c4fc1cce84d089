from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlxgpt.backend.cpu import blas
from tests.helpers.commands import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a matter of Linux")

PRINT_STATUS = (
    "from mlxgpt.backend.cpu import blas; print(blas.has_fast_blas(), blas.blas_status()); "
    "import mlx.core as mx; "
)
MULTIPLY = "a = mx.ones((300, 300)); print((a @ a).sum().item()); "
PRINT_IS_MAPPED = "print('openblas-' in open('/proc/self/maps').read())"


def run_python(code: str, **environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_openblas_is_under_mlx(tmp_path: Path) -> None:
    """Made anew in an empty cache, then taken from it; the product is right."""
    for _ in range(2):
        lines = run_python(PRINT_STATUS + MULTIPLY + PRINT_IS_MAPPED, XDG_CACHE_HOME=str(tmp_path))
        assert lines[0].startswith("True OpenBLAS 0.3.")
        assert lines[1:] == ["27000000.0", "True"]
        (cached,) = (tmp_path / "mlxgpt").iterdir()
        assert cached.name.startswith("openblas-0.3.")


def test_mlx_calls_it(tmp_path: Path) -> None:
    """Not only loaded: a profiler of our own in its place sees MLX's products."""
    code = (
        "import ctypes; from mlxgpt.backend.cpu import blas; import mlx.core as mx; "
        "shared = ctypes.CDLL(None); ours = [l for l in open('/proc/self/maps') "
        "if 'openblas-' in l]; "
        "low = min(int(l.split('-')[0], 16) for l in ours); "
        "high = max(int(l.split('-')[1].split()[0], 16) for l in ours); "
        "at = ctypes.cast(shared.cblas_sgemm, ctypes.c_void_p).value; print(low <= at < high)"
    )
    assert run_python(code, XDG_CACHE_HOME=str(tmp_path)) == ["True"]


@pytest.mark.parametrize(("given", "seen"), [(None, blas.THREAD_TIMEOUT_LOG2_CYCLES), ("24", "24")])
def test_its_threads_are_told_to_sleep_soon(
    given: str | None, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(blas.THREAD_TIMEOUT_ENV, raising=False)
    if given:
        monkeypatch.setenv(blas.THREAD_TIMEOUT_ENV, given)
    timeouts = []
    monkeypatch.setattr(blas, "_library", None)
    monkeypatch.setattr(
        ctypes, "CDLL", lambda *_, **__: timeouts.append(os.environ.get(blas.THREAD_TIMEOUT_ENV))
    )
    (library := tmp_path / "openblas.so").touch()
    blas._load_copy(library, library)
    assert timeouts == [seen]
    assert os.environ.get(blas.THREAD_TIMEOUT_ENV) == given


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no large pages"
)
def test_the_kernel_is_asked_for_large_pages_and_gives_none_before_they_are_used() -> None:
    code = (
        "import re, resource; from mlxgpt.backend.cpu import blas; "
        "maps = re.split(r'\\n(?=[0-9a-f]+-)', open('/proc/self/smaps').read()); "
        "heaps = [m for m in maps if '[heap]' in m and ' hg' in m]; "
        "print(sum(int(re.search(r'Size: +(\\d+)', m)[1]) for m in heaps) // 1024); "
        "print(sum(int(re.search(r'Rss: +(\\d+)', m)[1]) for m in heaps) // 1024)"
    )
    requested_mb, used_mb = map(int, run_python(code))
    assert requested_mb >= (blas.RESERVED_HEAP_BYTES >> 20) - 2
    assert used_mb < 32


def test_without_a_cache_folder_it_works_and_leaves_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    lines = run_python(
        PRINT_STATUS + MULTIPLY + PRINT_IS_MAPPED,
        XDG_CACHE_HOME=str(blocked / "x"),
        TMPDIR=str(tmp_path),
    )
    assert lines[0].startswith("True OpenBLAS")
    assert not list(tmp_path.glob("mlxgpt-*"))


@pytest.mark.parametrize(
    ("breaking", "reason"),
    [
        ("import sys; sys.path[:] = [p for p in sys.path if 'packages' not in p]", "not installed"),
        ("import mlx.core", "import mlxgpt first"),
    ],
)
def test_where_it_cannot_be_the_reason_is_told(breaking: str, reason: str) -> None:
    root = str(ROOT)
    code = (
        f"{breaking}\nimport sys; sys.path.append({root!r})\nfrom mlxgpt.backend.cpu import blas\n"
    )
    (line,) = run_python(code + "print(blas.has_fast_blas(), blas.blas_status())")
    assert line.startswith("False reference BLAS (slow): ")
    assert reason in line


def test_a_failing_patchelf_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(blas, "SYMBOLS", ("no_such_symbol",))
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delitem(sys.modules, "mlx.core")
    with pytest.raises(blas._UnavailableError, match="patchelf is not installed"):
        blas._load_openblas()
    assert list((tmp_path / "mlxgpt").iterdir()) == []


def test_all_threads_share_one_arena() -> None:
    """And freed pages are kept; the numbers are those of glibc's malloc.h."""
    options: dict[int, int] = {}
    blas._keep_freed_pages(SimpleNamespace(mallopt=options.__setitem__))  # type: ignore[arg-type]
    assert options == {-8: 1, -3: 32 << 20, -1: 1 << 30}


def test_it_says_whose_kernels_it_chose(tmp_path: Path) -> None:
    """Every machine of these can take the oldest."""
    core = {"x86_64": "Nehalem", "aarch64": "armv8"}.get(platform.machine())
    if core is None:
        pytest.skip("OpenBLAS has other names for this architecture")
    (line,) = run_python(PRINT_STATUS, OPENBLAS_CORETYPE=core)
    assert line.endswith(f" ({core})")


def test_threads_share_what_blas_has() -> None:
    code = (
        "ask = blas._library.scipy_openblas_get_num_threads; all = ask(); "
        "shared = blas.share_blas_threads(2); shared.__enter__(); "
        "print(ask() == max(1, all // 2)); "
        "shared.__exit__(None, None, None); print(ask() == all)"
    )
    assert run_python(PRINT_STATUS + code)[1:] == ["True", "True"]


def test_who_leaves_last_gives_all_threads_back() -> None:
    """Two texts written in turn leave in any order."""
    code = (
        "ask = blas._library.scipy_openblas_get_num_threads; all = ask(); "
        "one, other = blas.share_blas_threads(2), blas.share_blas_threads(all); "
        "one.__enter__(); other.__enter__(); "
        "one.__exit__(None, None, None); print(ask() == 1); "
        "other.__exit__(None, None, None); print(ask() == all)"
    )
    assert run_python(PRINT_STATUS + code)[1:] == ["True", "True"]
