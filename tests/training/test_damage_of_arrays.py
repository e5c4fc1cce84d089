"""A token array is cut short while a training reads it: the cause is named, nothing is lost, and
with the array restored the same command ends as if nothing had happened.
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

# A training that does something to its data after step 6. Where it is not to notice, it reads the
# array as if it had been cut right after the check.
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
    """The same training as run `whole`; its arrays are also in `kept`."""
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
    """What is wrong now, and what may have been meant."""
    size, expected_size = (
        (folder / "train.bin").stat().st_size for folder in (DATA_FOLDER, Path("kept"))
    )
    assert expect_error(capsys, *command) == (
        f"{DATA_FOLDER}/train.bin has {size:,} bytes, but meta.json expects {expected_size:,}"
    )


@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.exact_bits
def test_an_array_that_is_cut_short_is_named_at_once(
    uninterrupted_run: Path, capsys: Capture, size: int
) -> None:
    """Also where the rest of its page would read as zeros."""
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
def test_where_it_is_read_before_that_is_noticed_the_next_start_names_it(
    uninterrupted_run: Path, capsys: Capture
) -> None:
    """The system ends the process with SIGBUS, which cannot be helped."""
    process = train_and_damage('os.truncate(folder / "train.bin", 0)', notices=False)
    # The latter where memory is limited, and another process waits for this one.
    assert process.returncode in (-signal.SIGBUS, 128 + signal.SIGBUS)
    assert_size_refused(capsys, *TRAIN_COMMAND, "--run", "a")
    assert_resumes_to_the_same_bits()


@pytest.mark.exact_bits
def test_another_file_under_its_name_changes_nothing_for_who_reads_the_old_one(
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
def test_whoever_reads_a_cut_array_is_told(
    place: Path, split: str, read: Callable[[np.ndarray], object]
) -> None:
    tokens = getattr(open_dataset(DATA_FOLDER), split)
    read(tokens.ids)
    os.truncate(DATA_FOLDER / f"{split}.bin", 10)
    with pytest.raises(UserError, match=f"{split}.bin was truncated while in use: 10 of "):
        read(tokens.ids)
