"""A server that imports mlxgpt once and runs each command in a forked child, since imports take
most of the time of a short command. Run as `python -m tests.faults.forked`.

Measurements of the machine are replaced by constants, so that commands are fast and deterministic.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.helpers.commands import ROOT


@dataclass(frozen=True)
class CommandResult:
    """Result of a command.

    Attributes:
        code: exit code, negative for a signal; None if it hung and was killed.
        out, err: its stdout and stderr.
    """

    code: int | None
    out: str
    err: str


class ForkServer:
    """Runs commands one after the other, each in a forked process; a context manager.

    Args:
        library: preloaded into all processes; see inject.c.
        modules: further modules to import before forking.
    """

    def __init__(self, library: Path | None = None, modules: Sequence[str] = ()) -> None:
        preload = {"LD_PRELOAD": str(library)} if library else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forked", *modules],
            # An unbuffered stdout loses the rest of a short write.
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "", **preload},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(
        self, argv: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path | None = None
    ) -> int:
        """Start `mlxgpt` with these arguments; return its process id (also the process group's).

        Args:
            log: folder for the files `out` and `err`; default: `cwd`/log.
        """
        log = log or cwd / "log"
        log.mkdir(parents=True, exist_ok=True)
        job = {"argv": list(argv), "cwd": str(cwd), "env": dict(env), "log": str(log)}
        self._log = log
        return int(self._request(json.dumps(job))["pid"])

    def wait(self) -> int:
        """Wait for the started command; return its exit code."""
        return int(self._read_reply()["code"])

    def run(
        self,
        argv: Sequence[str],
        cwd: Path,
        env: Mapping[str, str],
        log: Path | None = None,
        timeout: float = 120.0,
    ) -> CommandResult:
        """Run `mlxgpt` with these arguments and wait for it.

        Args:
            timeout: seconds after which it counts as hanging and is killed.
        """
        pid = self.start(argv, cwd, env, log)
        deadline = time.monotonic() + timeout
        code: int | None = None
        while time.monotonic() < deadline:
            if not is_running(pid):
                code = self.wait()
                break
            time.sleep(0.005)
        else:
            os.killpg(pid, signal.SIGKILL)
            self.wait()
        out, err = (
            (self._log / name).read_text(encoding="utf-8", errors="replace")
            for name in ("out", "err")
        )
        return CommandResult(code, out, err)

    def _request(self, line: str) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read_reply()

    def _read_reply(self) -> dict[str, Any]:
        assert self._process.stdout
        reply: dict[str, Any] = json.loads(self._process.stdout.readline())
        return reply


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _serve() -> None:
    import matplotlib.backends.backend_svg
    import matplotlib.figure

    from mlxgpt import api
    from mlxgpt.backend import device
    from mlxgpt.backend.cpu import jit
    from mlxgpt.cli import main as cli
    from mlxgpt.cli import parser, training_display
    from mlxgpt.convert import exporting, importing
    from mlxgpt.data import prepare_job, tokenize
    from mlxgpt.html_report import run_page as pages
    from mlxgpt.training import estimate, loop, selfcheck, setup
    from mlxgpt.training.estimate import Estimate
    from mlxgpt.utils import files

    for name in sys.argv[1:]:
        importlib.import_module(name)
    assert all((api, parser, training_display, matplotlib, exporting, importing, pages, loop))
    # Small chunks, so that there is progress to resume from even for a small text.
    tokenize.CHUNK_CHARS, prepare_job.SAVE_EVERY_CHUNKS = 1 << 12, 2
    if gxx := jit.find_gxx():  # tested once instead of in each child
        jit._try_compiler(next(files.iter_cache_folders()), gxx)
    jit._try_compiler = lambda *_: None
    selfcheck.run_self_check = lambda *_: iter([])
    device.matmul_peak = lambda dtype: 1e9  # type: ignore[assignment]
    for module in (estimate, setup):
        module.estimate_training = lambda *_: Estimate(1e-3, 0.0, 0, 0)  # type: ignore[attr-defined]
    replies = os.fdopen(os.dup(1), "w")
    os.set_inheritable(replies.fileno(), False)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _set_up_child(job)
            cli.run_and_exit()
        print(json.dumps({"pid": pid}), file=replies, flush=True)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code}), file=replies, flush=True)


def _set_up_child(job: dict[str, Any]) -> None:
    """Set up this forked process as if it had been started with the command."""
    os.setsid()
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(Path(job["log"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    os.dup2(sys.stdin.fileno(), 0)
    sys.argv = ["mlxgpt", *job["argv"]]
    if "FAULT_ROOTS" in job["env"]:
        ctypes.CDLL(None).fault_begin()


if __name__ == "__main__":
    _serve()
