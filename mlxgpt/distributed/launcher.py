"""Detect the launcher of this process: mlx.launch, mpirun or none.

Standard library only: the command line imports this, and `--help` must not wait for MLX.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from pathlib import Path


def get_rank() -> int:
    """Rank of this process, from the launcher's environment; 0 without a launcher."""
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


def is_launched() -> bool:
    """Whether a launcher started this process together with others."""
    if path := os.environ.get("MLX_HOSTFILE"):
        with contextlib.suppress(OSError):
            return bool(Path(path).read_text().strip())  # empty for a single process
        return True  # MLX reports an unreadable hostfile
    names = ("MLX_IBV_DEVICES", "MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")
    return any(os.environ.get(name, "1") != "1" for name in names)


def read_hostfile() -> list[str]:
    """Addresses of all ranks from mlx.launch's hostfile; empty without one."""
    with contextlib.suppress(OSError, ValueError, LookupError, AttributeError):
        nodes = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())
        return [str(node[0]).rpartition(":")[0] for node in nodes]
    return []


def resume_command() -> str:
    """The command line of this process, for the user to run again."""
    program = Path(sys.argv[0])
    is_mlxgpt = program.name == "mlxgpt" or program.parts[-2:] == ("mlxgpt", "__main__.py")
    words = ["mlxgpt", *sys.argv[1:]] if is_mlxgpt else ["python", *sys.orig_argv[1:]]
    return prepend_launcher(shlex.join(words))


def prepend_launcher(command: str) -> str:
    """Prefix a command with the launcher that started this process, if any."""
    if not is_launched():
        return command
    hosts = read_hostfile()
    is_local = hosts and set(hosts) <= {"127.0.0.1", "localhost"}
    return f"mlx.launch {f'-n {len(hosts)}' if is_local else '--hostfile YOURS.json'} -- {command}"
