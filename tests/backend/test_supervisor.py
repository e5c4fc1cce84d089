"""With limited memory, commands run in a child process. Uses real processes under a large limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, SMALL_TRAIN_COMMAND
from tests.helpers.training_runs import final_state, metrics

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory so")

LIMIT_MEMORY = "import resource; resource.setrlimit(resource.RLIMIT_AS, 2 * (64 << 30,))\n"
TRAIN = (
    f"{SMALL_TRAIN_COMMAND} --max-steps 12 --save-interval 4 --log-interval 1 --dropout 0.1".split()
)
TRAIN += ["--source", "words.txt"]

# mlxgpt's entry point with a replaced `main`.
CODE = """
import ctypes, os, signal, sys, time
from mlxgpt.cli import main as cli

def main():
    {body}

cli.main = main
cli.run_and_exit()
"""


def start_limited(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LIMIT_MEMORY + code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_limited(body: str) -> tuple[int, list[str]]:
    process = start_limited(CODE.format(body=body))
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr.splitlines()


@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("ctypes.string_at(0)", "SIGSEGV"),  # MLX after a failed allocation
        ("os.abort()", "SIGABRT"),  # an exception in a C++ thread
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),  # the OOM killer, in a container
        ("os._exit(1)", "code 1"),  # OpenBLAS
    ],
)
def test_a_crash_is_explained(body: str, how: str) -> None:
    code, lines = run_limited(body)
    assert code == 2
    problem, remedy = lines[-2:]
    assert problem.startswith(f"mlxgpt: the process ended with {how}, probably out of memory: ")
    assert " is limited to " in problem
    assert remedy.startswith("  → use a smaller --batch-size or model, or ")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return 0", 0),
        ("return 2", 2),
        ("return 130", 130),
        ("raise SystemExit(0)", 0),
        ("os.kill(os.getpid(), signal.SIGUSR1)", 128 + signal.SIGUSR1),
    ],
)
def test_other_exit_codes_are_passed_through(body: str, expected: int) -> None:
    assert run_limited(body) == (expected, [])


def test_bug_is_shown_with_its_traceback() -> None:
    code, lines = run_limited("raise KeyError('mine')")
    assert code == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2] == "KeyError: 'mine'"
    assert lines[-1].startswith("mlxgpt: unexpected error, KeyError: 'mine'; please report it")


def test_python_memory_error_is_explained(home: Path) -> None:
    code = (
        "from mlxgpt.cli import main as cli\n"
        "def fails(*_): bytes(1 << 40)\n"
        "cli.COMMANDS['runs'].run = fails\n"
        "cli.run_and_exit()\n"
    )
    process = start_limited(code, "runs")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert stderr.startswith("mlxgpt: out of memory: ")


WAIT_BODY = """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    try:
        print(os.getpid(), flush=True)
        time.sleep(120)
    except KeyboardInterrupt:
        return 5
"""


@contextlib.contextmanager
def waiting_process() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Yield the supervisor of a running command and the pid of its child."""
    process = start_limited(CODE.format(body=WAIT_BODY))
    assert process.stdout
    child = int(process.stdout.readline())
    assert child != process.pid
    yield process, child
    process.communicate(timeout=120)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 5), (signal.SIGTERM, 7)])
def test_signals_reach_the_command(number: signal.Signals, code: int) -> None:
    with waiting_process() as (process, _):
        process.send_signal(number)
        assert process.wait(120) == code


def test_command_ends_when_its_supervisor_is_killed() -> None:
    with waiting_process() as (process, child):
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while is_running(child) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_without_a_limit_there_is_no_child_process() -> None:
    code = (
        "import os; from mlxgpt.cli import main as cli; from mlxgpt.backend import memory_limits\n"
        "memory_limits.memory_limits = list\n"
        "cli.main = lambda: print(os.getpid())\n"
        "cli.run_and_exit()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    stdout, _ = process.communicate(timeout=120)
    assert int(stdout) == process.pid


OUT_OF_MEMORY_CODE = """
from mlxgpt.cli import main as cli
import mlx.core as mx
from mlxgpt.storage.run import Run
from mlxgpt.training import selfcheck

selfcheck.run_self_check = lambda config: iter([])
log = Run.log

def exhaust(run, record):
    log(run, record)
    if record["step"] == 6:  # no memory is left when MLX asks for more
        resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
        mx.eval(mx.ones(1 << 28))

Run.log = exhaust
cli.run_and_exit()
"""


@pytest.mark.exact_bits
def test_training_that_runs_out_of_memory_resumes_bit_exactly(home: Path, text_file: Path) -> None:
    from mlxgpt.cli import main as cli

    assert cli.main([*TRAIN, "--run", "whole"]) == 0
    process = start_limited(OUT_OF_MEMORY_CODE, *TRAIN, "--run", "a")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2, stderr
    problem, remedy = stderr.splitlines()[-2:]
    assert problem.startswith("mlxgpt: ")
    assert "memory" in problem
    assert "smaller --batch-size" in remedy
    assert cli.main([*TRAIN, "--run", "a"]) == 0
    expected, actual = final_state("whole"), final_state("a")
    assert expected.keys() == actual.keys()
    assert all((actual[name] == value).all() for name, value in expected.items())
    assert metrics("a") == metrics("whole")
