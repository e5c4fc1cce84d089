"""The C++ compiler (g++) that MLX calls at run time to compile fused kernels for the CPU.

On a CPU, `mx.compile` generates C++, calls `g++` and loads the library from TMPDIR. Without `g++`,
MLX silently executes one operation at a time; but if `g++` fails or the folder is not writable, the
computation raises an error. Both are therefore tested before the first kernel is compiled; if that
fails, `execution` disables compilation, which is slower and rounds differently.

Kernels are kept in the user's cache folder: TMPDIR is shared by all users, and another user could
place a library there for us to load. MLX calls `g++` through a script, because Ctrl-C in a terminal
also reaches `g++`, which then leaves an empty library that no later run can load. With the script,
a library appears complete or not at all. While a training run finishes its step, the script ignores
Ctrl-C.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx

from mlxgpt.backend import device_errors
from mlxgpt.backend.macos import is_xcode_stub
from mlxgpt.utils import files

# Environment variables for the script: path of the real g++, and whether to ignore Ctrl-C.
GXX_ENV, IGNORE_SIGINT_ENV = "MLXGPT_GXX", "MLXGPT_IGNORE_SIGINT"

SCRIPT_HEADER = "#!/bin/sh\n# Calls g++ for MLX"  # the same in all versions of mlxgpt
SCRIPT_FOLDER = "compiler"  # in the user's cache folder

# Measured on two machines: docs/linux.md.
SLOWDOWN_NOTE = "kernel fusion is off, and a step takes 1.1 to 1.5 times as long"


@contextlib.contextmanager
def shield_from_sigint() -> Iterator[None]:
    """Context in which Ctrl-C does not kill the compiler, which would fail the computation."""
    os.environ[IGNORE_SIGINT_ENV] = "yes"
    try:
        yield
    finally:
        del os.environ[IGNORE_SIGINT_ENV]


INSTALL_COMMAND = "xcode-select --install" if sys.platform == "darwin" else "sudo apt install g++"


@functools.cache
def compiler_problem() -> str | None:
    """Why MLX cannot compile kernels for the CPU, in one line; None if it can.

    The first call tests the compiler, and sets TMPDIR and puts the script first in PATH.
    """
    if "MLX_DISABLE_COMPILE" in os.environ:  # MLX reads this; its value does not matter
        return f"MLX_DISABLE_COMPILE is set: {SLOWDOWN_NOTE}"
    gxx = find_gxx()
    if not gxx:
        return f"no C++ compiler (g++): {SLOWDOWN_NOTE}; to install one: {INSTALL_COMMAND}"
    failure = "no writable cache folder"
    for folder in files.iter_cache_folders():
        try:
            _try_compiler(folder, gxx)
        except (OSError, subprocess.SubprocessError) as error:
            failure = _summarize_error(error)
            continue
        _use_script(folder, gxx)
        return _try_first_kernel()
    return describe_failure(failure)


def describe_failure(reason: str) -> str:
    """One-line message for a failure of the C++ compiler."""
    return f"the C++ compiler failed ({reason}): {SLOWDOWN_NOTE}"


def find_gxx() -> str | None:
    """Path of the first g++ in PATH that is not our script, which child processes have in PATH."""
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        path = shutil.which("g++", path=folder)
        if path and not _is_script(Path(path)) and not is_xcode_stub(path):
            return path
    return None


def remove_script_from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Copy of an environment without our script and TMPDIR, for processes other than mlxgpt."""
    copy = dict(environment)
    if copy.pop(GXX_ENV, None):
        script_folder = str(Path(copy.pop("TMPDIR", "")) / SCRIPT_FOLDER)
        paths = copy["PATH"].split(os.pathsep)
        copy["PATH"] = os.pathsep.join(path for path in paths if path != script_folder)
    return copy


def _is_script(gxx: Path) -> bool:
    """Whether a g++ is the script of any version of mlxgpt."""
    if not os.access(gxx, os.R_OK):
        return False
    with gxx.open("rb") as file:
        return file.read(len(SCRIPT_HEADER)) == SCRIPT_HEADER.encode()


# Without errno, g++ vectorizes square roots: AdamW takes a quarter of the time.
VECTORIZE_FLAG = "-fno-math-errno"

SCRIPT = f"""{SCRIPT_HEADER}; see backend/cpu/jit.py of mlxgpt.
if [ -n "${IGNORE_SIGINT_ENV}" ]; then trap '' INT; fi
before= result= shared=
for argument; do
    if [ "$before" = -o ]; then result=$argument; fi
    if [ "$argument" = -shared ]; then shared=yes; fi
    before=$argument
done
# MLX makes nothing but shared libraries: any other call is not MLX's.
if [ -z "$result" ] || [ -z "$shared" ]; then exec "${GXX_ENV}" "$@"; fi
"${GXX_ENV}" {VECTORIZE_FLAG} "$@" -o "$result.$$" && mv "$result.$$" "$result"
"""

GXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")  # the same as MLX's
TRIAL_SOURCE = '#include <cstdint>\nextern "C" std::int32_t trial() { return 42; }\n'
MIN_FREE_BYTES = 64_000_000  # disk space for kernels
TRIAL_TIMEOUT = 60  # seconds


def _try_compiler(folder: Path, gxx: str) -> None:
    """Write the script to a folder, compile a test library with it, load the library and call it.

    Raises:
        OSError, SubprocessError: if any of these fails.
    """
    if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
        raise OSError(f"{folder} is full")
    script = folder / SCRIPT_FOLDER / "g++"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not files.exists(script) or script.read_bytes() != SCRIPT.encode():
            script.parent.mkdir(exist_ok=True)
            (new_script := Path(scratch) / "g++").write_text(SCRIPT)
            new_script.chmod(0o755)
            new_script.replace(script)
        source, library = Path(scratch) / "trial.cpp", Path(scratch) / "trial.so"
        source.write_text(TRIAL_SOURCE)
        subprocess.run(
            [str(script), *GXX_FLAGS, str(source), "-o", str(library)],
            # g++ writes its temporary files to TMPDIR.
            env={**os.environ, GXX_ENV: gxx, "TMPDIR": str(folder)},
            check=True,
            capture_output=True,
            timeout=TRIAL_TIMEOUT,
        )
        if ctypes.CDLL(str(library)).trial() != 42:
            raise OSError("its output does not run")


def _use_script(folder: Path, gxx: str) -> None:
    """Make MLX call the script and keep its kernels in the folder."""
    with contextlib.suppress(OSError):
        tempfile.gettempdir()  # cached by Python, so that its own temporary folder stays the same
    os.environ["TMPDIR"] = str(folder)
    os.environ["PATH"] = f"{folder / SCRIPT_FOLDER}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ[GXX_ENV] = gxx


KERNEL_FAILED = "it cannot compile MLX's kernels"


def _try_first_kernel() -> str | None:
    """Compile a first MLX kernel, which has a much larger header than our test library. Returns why
    it failed, in one line, or None.
    """
    try:
        y = mx.compile(lambda x: x * mx.sigmoid(x) + 1)(mx.arange(8.0))
        mx.export_to_dot(graph := io.StringIO(), y)
        mx.eval(y)
    except RuntimeError as error:
        if not device_errors.is_compile_failure(error):
            raise
        return describe_failure(KERNEL_FAILED)
    # MLX calls `g++ --version` once (backend/cpu/jit_compiler.cpp). If that fails, it silently
    # fuses nothing for the rest of the process, and the bits differ.
    return (
        None if "Compiled" in graph.getvalue() else describe_failure("it does not respond to MLX")
    )


def _summarize_error(error: OSError | subprocess.SubprocessError) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it did not finish in {error.timeout:.0f} s"
    stderr = getattr(error, "stderr", b"") or b""
    lines = stderr.decode(errors="replace").splitlines() or str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
