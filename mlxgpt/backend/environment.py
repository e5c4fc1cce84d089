"""What the bits of a training hang on beside its settings: machine, libraries, threads."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from importlib.metadata import version

from mlxgpt import __version__
from mlxgpt.backend.cpu import blas
from mlxgpt.backend.cpu import jit as compiler
from mlxgpt.machine import device


def surroundings(ranks: int = 1) -> dict[str, str]:
    """What is here, by name; of how many ranks."""
    found = {"mlxgpt": __version__, "mlx": version("mlx"), "device": device.name()}
    found["ranks"] = str(ranks)
    found["backend"] = device.backend()
    if device.on_cpu():
        found |= {"BLAS": blas.status(), "BLAS threads": str(blas.threads())}
        found["compiler"] = "none" if compiler.status() else _version()
    elif compiler.status():
        found["compiler"] = "none"
    return found


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is another than before, in a few words each."""
    return [
        f"{name} {before[name]} → {value}"
        for name, value in now.items()
        if before.get(name, value) != value
    ]


def _version() -> str:
    try:
        said = subprocess.run(
            [compiler.real() or "g++", "-dumpfullversion"],
            capture_output=True,
            text=True,
            timeout=9,
        )
        return f"g++ {said.stdout.strip()}"
    except (OSError, subprocess.SubprocessError):
        return "g++"
