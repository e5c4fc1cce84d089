"""Commands that run out of memory end with a clear two-line error."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlxgpt.backend import memory_limits
from mlxgpt.backend.memory_limits import MemoryLimit
from mlxgpt.cli import main as cli
from mlxgpt.cli.commands import train
from mlxgpt.experiments import planning
from mlxgpt.training import setup
from tests.helpers.commands import ROOT, SMALL_TRAIN_COMMAND, Capture, expect_error

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory so")

MB = 1 << 20
TRAIN = ["train", "--tier", "1", "--source", "long.txt", "--run", "a"]
TRAIN += ["--max-steps", "4", "--eval-interval", "2"]
COMMANDS = {
    "train": TRAIN,
    "eval": ["eval", "--run", "done"],
    "generate": ["generate", "--run", "done", "--max-tokens", "20"],
}


def run_with_limit(megabytes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command with this limit on its address space."""
    line = shlex.join([sys.executable, "-m", "mlxgpt", *command])
    return subprocess.run(
        ["sh", "-c", f"ulimit -v {1024 * megabytes}; exec {line}"],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        check=False,
    )


def is_refused_clearly(result: subprocess.CompletedProcess[str]) -> bool:
    """Return whether the command was refused; a refusal must be a two-line error about memory."""
    assert "Traceback" not in result.stderr
    if result.returncode == 0:
        return False
    assert result.returncode == 2, result.stderr
    problem, remedy = result.stderr.splitlines()[-2:]
    assert problem.startswith("mlxgpt: ")
    assert "memory" in problem or "address space" in problem or "training needs" in problem
    assert remedy.startswith("  → ")
    return True


@pytest.fixture
def min_megabytes(monkeypatch: pytest.MonkeyPatch) -> int:
    """Megabytes of address space that mlxgpt requires on this machine."""
    monkeypatch.setattr(memory_limits.resource, "getrlimit", lambda kind: (1 << 40, 1 << 40))
    return memory_limits.memory_limits()[0].required // MB


@pytest.fixture(autouse=True)
def long_text(place: Path, text: str) -> None:
    Path("long.txt").write_text(text * 10, encoding="utf-8")
    assert cli.main(["prepare", "long.txt"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_too_little_memory_to_start(place: Path, command: str, min_megabytes: int) -> None:
    result = run_with_limit(min_megabytes - 20, *COMMANDS[command])
    assert is_refused_clearly(result)
    assert "to start" in result.stderr


def test_too_little_memory_for_the_model(place: Path, min_megabytes: int) -> None:
    """The estimate refuses it; with the estimate overridden, the crash is explained."""
    large = [*TRAIN, "--n-embd", "768"]
    result = run_with_limit(min_megabytes + 100, *large)
    assert is_refused_clearly(result)
    assert "training needs" in result.stderr
    assert is_refused_clearly(run_with_limit(min_megabytes + 100, *large, "--memory-limit", "9"))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_limit_succeeds_or_is_refused_clearly(place: Path, command: str) -> None:
    refusals = [
        is_refused_clearly(run_with_limit(megabytes, *COMMANDS[command]))
        for megabytes in (100, 150, 200, 250, 300, 350, 400, 500, 600, 700, 800, 900)
    ]
    print(command, refusals)
    assert refusals == sorted(refusals, reverse=True), "what fits once fits with more"


def test_model_too_large_for_the_container_is_refused_before_timing(
    place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = MemoryLimit(
        "this container's memory", 400 * MB, 390 * MB, memory_limits.MIN_RESIDENT, ""
    )
    monkeypatch.setattr(memory_limits, "memory_limits", lambda: [container])
    for module in (setup, planning):
        monkeypatch.setattr(module, "check_and_estimate", lambda *_: pytest.fail("it was timed"))
    line = [*TRAIN, "--n-embd", "384", "--n-layer", "6", "--batch-size", "32"]
    assert expect_error(capsys, *line).startswith(
        "training needs 0.59 GB of memory, but the limit is 0.27"
    )
    line = ["compare", "--tier", "1", "--vary", "n_embd=768,1152", "--budget", "5steps"]
    assert expect_error(capsys, *line, "--source", "long.txt").startswith("training needs")


def test_python_memory_error_is_explained(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise MemoryError

    monkeypatch.setattr(train, "run", fail)
    assert expect_error(capsys, *SMALL_TRAIN_COMMAND.split()).startswith("out of memory")
