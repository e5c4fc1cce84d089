"""Whether MLX can compile its fused kernels while it runs; on the CPU, the C++ compiler for that.

On the CPU `mx.compile` writes C++, calls `g++`, and loads the result from TMPDIR. Without a `g++`
it quietly computes one operation after the other; but a `g++` that fails, or a folder that cannot
be written, ends the computation with an error. So both are tried before the first kernel is made,
and where they fail MLX is told not to compile: slower, to the same end.

The kernels are kept in the user's cache folder: in TMPDIR, which all users share, somebody else
could have put a library for us to load. And `g++` is called through a script. Ctrl-C in a terminal
reaches every process, g++ too, which then leaves an empty library that no later run can load:
through the script a library appears whole, or not. And while a training is to finish its step, the
script is deaf to Ctrl-C.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxgpt import files
from mlxgpt.machine import device_errors
from mlxgpt.machine.device import on_cpu
from mlxgpt.machine.mac import is_stub

# The environment's names for the path of the real g++, and for whether Ctrl-C is not for it.
REAL, UNDISTURBED = "MLXGPT_GXX", "MLXGPT_UNDISTURBED"
# Square roots need not tell C's errno of negative numbers, and so can be taken four at a time: an
# AdamW update of the same bits in a quarter of the time.
VECTORISE = "-fno-math-errno"
SCRIPT = f"""#!/bin/sh
# Calls g++ for MLX; see compiler.py of mlxgpt.
if [ -n "${UNDISTURBED}" ]; then trap '' INT; fi
before= result= shared=
for argument; do
    if [ "$before" = -o ]; then result=$argument; fi
    if [ "$argument" = -shared ]; then shared=yes; fi
    before=$argument
done
# What is no library is not MLX's.
if [ -z "$result" ] || [ -z "$shared" ]; then exec "${REAL}" "$@"; fi
"${REAL}" {VECTORISE} "$@" -o "$result.$$" && mv "$result.$$" "$result"
"""
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")  # MLX's own
TRIAL = '#include <cstdint>\nextern "C" std::int32_t trial() { return 42; }\n'
ROOM = 64_000_000  # bytes that should be free for kernels
# Measured on two machines: docs/linux.md.
SLOWER = "MLX fuses no operations, and a step takes 1.1 to 1.5 times as long"
_failure: str | None = None  # the line on why compilation was disabled
GET_ONE = "xcode-select --install" if sys.platform == "darwin" else "sudo apt install g++"


def compiled(function: Callable, **given: Any) -> Callable:
    """`mx.compile` of a function, where this machine can compile."""
    status()
    return mx.compile(function, **given)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """While Ctrl-C is not to end what is being computed."""
    os.environ[UNDISTURBED] = "yes"
    try:
        yield
    finally:
        del os.environ[UNDISTURBED]


def status() -> str | None:
    """One line on why nothing is compiled here; None where all is well."""
    return _failure or (_tried() if on_cpu() else None)


@functools.cache
def _tried() -> str | None:
    if "MLX_DISABLE_COMPILE" in os.environ:  # MLX's own; its value does not matter
        return f"MLX_DISABLE_COMPILE is set: {SLOWER}"
    gxx = real()
    if not gxx:
        return f"no C++ compiler (g++): {SLOWER}; to get one, for instance: {GET_ONE}"
    problem = "no folder to write to"
    for folder in files.own_folders():
        try:
            _try(folder, gxx)
        except (OSError, subprocess.SubprocessError) as error:
            problem = _first_line(error)
            continue
        with contextlib.suppress(OSError):
            tempfile.gettempdir()  # Python's own stays where it is
        os.environ["TMPDIR"] = str(folder)
        os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        os.environ[REAL] = gxx
        try:
            # With MLX's own header, which is much more than the trial has.
            trial = mx.compile(lambda x: x * mx.sigmoid(x) + 1)(mx.arange(8.0))
            mx.export_to_dot(graph := io.StringIO(), trial)
            mx.eval(trial)
        except RuntimeError as error:
            if line := disable_after_failure(error):
                return line
            raise
        # MLX asks `g++ --version` once (backend/cpu/jit_compiler.cpp); without an answer it fuses
        # nothing for as long as the process lives, and the bits are others, without a word.
        return None if "Compiled" in graph.getvalue() else _without("it does not answer MLX")
    return _without(problem)


def disable_after_failure(error: RuntimeError) -> str | None:
    """Compile nothing from now on, after a computation that failed because a kernel could not be
    compiled; it can then be started over.

    Returns:
        One line on that; None if it failed for another reason, or nothing is compiled already.
    """
    if _failure or not device_errors.is_compile_failure(error):
        return None
    if device_errors.CPU_COMPILE_FAILURE in str(error):
        return _without("it cannot make MLX's kernels")
    first, *others = str(error).strip().splitlines()
    reason = " ".join([first, *others[:1]])[:300]
    return _disable(
        f"Metal cannot compile a kernel ({reason}): MLX fuses no operations, and is slower"
    )


def _without(problem: str) -> str:
    return _disable(f"the C++ compiler fails ({problem}): {SLOWER}")


def _disable(line: str) -> str:
    global _failure
    mx.disable_compile()
    _failure = line
    return line


def real() -> str | None:
    """The first g++ in PATH that is not our script, which is there for child processes too."""
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        found = shutil.which("g++", path=folder)
        if found and not _is_ours(Path(found)) and not is_stub(found):
            return found
    return None


def _is_ours(gxx: Path) -> bool:
    return gxx.stat().st_size == len(SCRIPT) and gxx.read_text() == SCRIPT


def _try(folder: Path, gxx: str) -> None:
    """Compile a trial there, load it and call it.

    Raises:
        OSError, SubprocessError: if one of these cannot be done.
    """
    if shutil.disk_usage(folder).free < ROOM:
        raise OSError(f"{folder} is full")
    script = folder / "bin" / "g++"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not files.exists(script) or not _is_ours(script):
            script.parent.mkdir(exist_ok=True)
            (fresh := Path(scratch) / "g++").write_text(SCRIPT)
            fresh.chmod(0o755)
            fresh.replace(script)
        source, library = Path(scratch) / "trial.cpp", Path(scratch) / "trial.so"
        source.write_text(TRIAL)
        subprocess.run(
            [str(script), *FLAGS, str(source), "-o", str(library)],
            env={**os.environ, REAL: gxx, "TMPDIR": str(folder)},  # g++ has files of its own there
            check=True,
            capture_output=True,
            timeout=60,
        )
        if ctypes.CDLL(str(library)).trial() != 42:
            raise OSError("what it makes does not run")


def _first_line(error: OSError | subprocess.SubprocessError) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it does not end in {error.timeout:.0f} s"
    said = getattr(error, "stderr", b"") or b""
    lines = said.decode(errors="replace").splitlines() or str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
