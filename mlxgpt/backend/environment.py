"""Environment settings that affect numerical results: device, library versions, threads."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from importlib.metadata import version

from mlxgpt import __version__
from mlxgpt.backend import device, execution
from mlxgpt.backend.cpu import blas, jit


def describe_environment(ranks: int = 1) -> dict[str, str]:
    """Library versions, device and thread counts of this machine, and the number of ranks."""
    environment = {"mlxgpt": __version__, "mlx": version("mlx"), "device": device.device_name()}
    environment |= {"ranks": str(ranks), "backend": device.device_type()}
    if device.on_cpu():
        environment |= {"BLAS": blas.blas_status(), "BLAS threads": str(blas.blas_thread_count())}
        environment["compiler"] = "none" if execution.compile_failure() else _gxx_version()
    elif execution.compile_failure():
        environment["compiler"] = "none"
    return environment


def environment_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """List the entries of `now` whose value changed, as "name old → new"."""
    return [
        f"{name} {before[name]} → {value}"
        for name, value in now.items()
        if before.get(name, value) != value
    ]


GXX_TIMEOUT = 9  # seconds for g++ to print its version


def _gxx_version() -> str:
    try:
        result = subprocess.run(
            [jit.find_gxx() or "g++", "-dumpfullversion"],
            capture_output=True,
            text=True,
            timeout=GXX_TIMEOUT,
        )
        return f"g++ {result.stdout.strip()}"
    except (OSError, subprocess.SubprocessError):
        return "g++"
