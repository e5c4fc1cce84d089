"""Distributed training on this machine; each rank is a process of tests/helpers/crash.py."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.helpers.commands import ROOT


class RankResults:
    """Exit codes and stderr of all ranks."""

    def __init__(self, codes: list[int], errors: list[str]) -> None:
        self.codes, self.errors = codes, errors


class RankProcesses:
    """Processes of all ranks, running in the current folder.

    Args:
        plans: one plan per rank for tests/helpers/crash.py; or
        command: Python arguments, the same for all ranks.
    """

    def __init__(
        self,
        plans: Sequence[Mapping[str, Any]] = (),
        *,
        command: Sequence[str] = (),
        size: int | None = None,
    ) -> None:
        size = size or len(plans)
        commands = [["-m", "tests.helpers.crash", json.dumps(plan)] for plan in plans]
        hostfile = Path("hosts.json").absolute()
        hosts = [[f"127.0.0.1:{port}"] for port in free_ports(size)]
        hostfile.write_text(json.dumps(hosts) if size > 1 else "")  # same as mlx.launch
        self.processes = [
            subprocess.Popen(
                [sys.executable, *(commands[rank] if commands else command)],
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "MLX_RANK": str(rank),
                    "MLX_HOSTFILE": str(hostfile),
                    "OPENBLAS_NUM_THREADS": "1",
                },
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def wait(self, seconds: float = 120) -> RankResults:
        """Wait until all ranks have ended."""
        errors = [process.communicate(timeout=seconds)[1] for process in self.processes]
        return RankResults([process.returncode for process in self.processes], errors)

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stderr
            process.stderr.close()


def train_on_ranks(plan: Mapping[str, Any], size: int) -> None:
    """Train on `size` ranks to the end."""
    with RankProcesses([plan] * size) as ranks:
        results = ranks.wait()
    assert results.codes == [0] * size, results.errors


def free_ports(count: int) -> list[int]:
    """Return ports that no process listens on."""
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [listener.getsockname()[1] for listener in sockets]
