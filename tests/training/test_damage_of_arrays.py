"""A token array is truncated while training reads it: the error names the cause, and after
restoring the array the same command resumes without any loss.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlxgpt.cli import main as cli
from mlxgpt.data.dataset import open_dataset
from mlxgpt.storage import checkpoint
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import ROOT, SMALL_TRAIN_COMMAND, Capture, expect_error
from tests.helpers.training_runs import final_state, metrics

TRAIN_COMMAND = (
    f"{SMALL_TRAIN_COMMAND} --max-steps 12 --save-interval 4 --log-interval 1 --dropout 0.1".split()
)
TRAIN_COMMAND += ["--source", "words.txt"]
DATA_FOLDER = Path("data/words")

# Training that damages its data after step 6. With `notices` false it reads the array unchecked, as
# if the damage happened right after the size check.
TRAIN_SCRIPT = """
import os, shutil, sys
from pathlib import Path
from mlxgpt.cli import main as cli
from mlxgpt.data.token_array import TokenArray
from mlxgpt.storage.run import Run
from mlxgpt.training import selfcheck

selfcheck.run_self_check = lambda config: iter([])
log, folder = Run.log, Path("data/words")

def cut(run, record):
    log(run, record)
    if record["step"] == 6:
        {action}

Run.log = cut
if not {notices}:
    TokenArray.ids = property(lambda self: self.array)
cli.run_and_exit()
"""


def train_and_damage(action: str, *, notices: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            TRAIN_SCRIPT.format(action=action, notices=notices),
            *TRAIN_COMMAND,
            "--run",
            "a",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def uninterrupted_run(home: Path, text_file: Path, no_check: None) -> Path:
    """Train run `whole` without damage, and copy its arrays to `kept`."""
    assert cli.main([*TRAIN_COMMAND, "--run", "whole"]) == 0
    shutil.copytree(DATA_FOLDER, "kept")
    return home


def assert_resumes_to_the_same_bits() -> None:
    shutil.copyfile("kept/train.bin", DATA_FOLDER / "train.bin")
    assert cli.main([*TRAIN_COMMAND, "--run", "a"]) == 0
    expected, actual = final_state("whole"), final_state("a")
    assert expected.keys() == actual.keys()
    assert all((actual[name] == value).all() for name, value in expected.items())
    assert metrics("a") == metrics("whole")


def assert_size_refused(capsys: Capture, *command: str) -> None:
    """Check that a command reports the actual and the expected size of the array."""
    size, expected_size = (
        (folder / "train.bin").stat().st_size for folder in (DATA_FOLDER, Path("kept"))
    )
    assert expect_error(capsys, *command) == (
        f"{DATA_FOLDER}/train.bin has {size:,} bytes, but meta.json expects {expected_size:,}"
    )


@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.exact_bits
def test_a_truncated_array_is_reported_immediately(
    uninterrupted_run: Path, capsys: Capture, size: int
) -> None:
    """Even if the rest of the memory page would read as zeros."""
    process = train_and_damage(f'os.truncate(folder / "train.bin", {size})')
    assert process.returncode == 2, process.stderr
    problem, remedy = process.stderr.splitlines()[-2:]
    assert f"train.bin was truncated while in use: {size} of 3,600 bytes remain" in problem
    assert "restore train.bin; or move" in remedy
    assert "Traceback" not in process.stderr
    assert checkpoint.list_steps(Path("runs/a/checkpoints"))[-1] >= 4
    assert_size_refused(capsys, *TRAIN_COMMAND, "--run", "a")
    assert_resumes_to_the_same_bits()


@pytest.mark.exact_bits
def test_a_truncated_array_is_reported_after_sigbus(
    uninterrupted_run: Path, capsys: Capture
) -> None:
    """The system kills the process with SIGBUS; the next start reports the cause."""
    process = train_and_damage('os.truncate(folder / "train.bin", 0)', notices=False)
    # 128 + SIGBUS if the command runs under a parent process that limits memory.
    assert process.returncode in (-signal.SIGBUS, 128 + signal.SIGBUS)
    assert_size_refused(capsys, *TRAIN_COMMAND, "--run", "a")
    assert_resumes_to_the_same_bits()


@pytest.mark.exact_bits
def test_replacing_the_file_does_not_affect_a_running_process(
    uninterrupted_run: Path, capsys: Capture
) -> None:
    action = 'Path("new").write_bytes(b""); os.replace("new", folder / "train.bin")'
    process = train_and_damage(action)
    assert process.returncode == 0, process.stderr
    assert metrics("a") == metrics("whole")
    for command in (["eval", "--run", "a"], [*TRAIN_COMMAND, "--run", "b"]):
        assert_size_refused(capsys, *command)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "read",
    [np.asarray, len, lambda ids: ids[:4].tolist()],
    ids=["as an array", "its length", "its first ids"],
)
def test_reading_a_truncated_array_is_an_error(
    place: Path, split: str, read: Callable[[np.ndarray], object]
) -> None:
    tokens = getattr(open_dataset(DATA_FOLDER), split)
    read(tokens.ids)
    os.truncate(DATA_FOLDER / f"{split}.bin", 10)
    with pytest.raises(UserError, match=f"{split}.bin was truncated while in use: 10 of "):
        read(tokens.ids)
