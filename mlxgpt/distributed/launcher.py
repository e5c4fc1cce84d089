"""Whether, and how, this process was launched together with others: by mlx.launch, or mpirun.

Standard library only, since whoever asks for help would wait for MLX.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path


def rank_here() -> int:
    """This process's rank as its launcher says it; 0 where nothing was launched."""
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


def launched() -> bool:
    """Whether a launcher started this process together with others."""
    if path := os.environ.get("MLX_HOSTFILE"):
        with contextlib.suppress(OSError):
            return bool(
                Path(path).read_text().strip()
            )  # for one process mlx.launch leaves it empty
        return True  # which the engine will say
    names = ("MLX_IBV_DEVICES", "MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")
    return any(os.environ.get(name, "1") != "1" for name in names)


def addresses() -> list[str]:
    """All ranks', as mlx.launch's hostfile has them; empty where there is none."""
    with contextlib.suppress(OSError, ValueError, LookupError, AttributeError):
        nodes = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())
        return [str(node[0]).rpartition(":")[0] for node in nodes]
    return []


def again_by_launcher(command: str) -> str:
    """A command that was launched, as a person gives it again."""
    if not launched():
        return command
    known = addresses()
    here = known and set(known) <= {"127.0.0.1", "localhost"}
    return f"mlx.launch {f'-n {len(known)}' if here else '--hostfile YOURS.json'} -- {command}"
