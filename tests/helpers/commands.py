"""Run mlxgpt commands in-process, for tests of error messages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxgpt.cli import main as cli
from mlxgpt.data import hash_cache

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]
SMALL_TRAIN_COMMAND = """train --tier 1 --n-layer 1 --n-head 1 --n-embd 8 --block-size 8
    --batch-size 2 --max-steps 4 --eval-interval 2 --sample-tokens 4 --warmup-steps 0"""
TRAIN_ARGS = SMALL_TRAIN_COMMAND.split()
LONG_TRAIN_ARGS = [*TRAIN_ARGS, "--source", "my.txt", "--max-steps", "150"]
LONG_TRAIN_ARGS += ["--eval-interval", "10", "--dropout", "0.1"]


def read_tree(folder: Path) -> dict[str, bytes]:
    """Return the content of each file in the folder, except hash caches."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != hash_cache.CACHE_FILENAME]
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


def expect_error(capsys: Capture, *argv: str) -> str:
    """Return the problem line of a command that must fail, print nothing and change no file."""
    before = read_tree(Path.cwd())
    capsys.readouterr()
    code = cli.main(list(argv))
    output = capsys.readouterr()
    assert code == 2, output.err
    assert output.out == ""
    problem, remedy = output.err.splitlines()[-2:]
    assert problem.startswith("mlxgpt: ")
    assert remedy.startswith("  → ")
    assert len(remedy) > 10
    assert read_tree(Path.cwd()) == before
    return problem.removeprefix("mlxgpt: ")


def run_program(*argv: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload]
        [sys.executable, "-m", "mlxgpt", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
