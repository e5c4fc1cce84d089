"""A full disk, a concurrent process, Ctrl-C or a closed pipe must not lose data."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlxgpt.cli import main as cli
from tests.helpers.commands import (
    LONG_TRAIN_ARGS,
    ROOT,
    TRAIN_ARGS,
    Capture,
    expect_error,
    run_program,
)

pytestmark = pytest.mark.usefixtures("no_check")  # the self-check has its own tests


def limit_file_size(size: int) -> Callable[[], None]:
    """Limit files to `size` bytes in a child process, so that writes fail as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk_while_preparing(home: Path) -> None:
    Path("my.txt").write_text("to be or not to be " * 500)
    result = run_program("prepare", "my.txt", preexec_fn=limit_file_size(10_000))
    assert result.returncode == 2
    assert "mlxgpt: data/.my.new/train.bin: File too large\n  → " in result.stderr
    assert "run the same command again to resume from here" in result.stderr
    assert not (home / "data" / "my").exists()
    assert run_program("prepare", "my.txt").returncode == 0


@pytest.mark.parametrize("size", [300, 2_000, 5_000])
def test_full_disk_while_training(home: Path, size: int) -> None:
    """Metrics or a checkpoint cannot be written; the run resumes from what was saved."""
    Path("my.txt").write_text("to be or not to be " * 500)
    assert run_program("prepare", "my.txt").returncode == 0
    line = [*TRAIN_ARGS, "--source", "my.txt", "--run", "a", "--log-interval", "1"]
    first = run_program(*line, "--max-steps", "2", "--decay-steps", "40")
    assert first.returncode == 0, first.stderr
    resume_line = [*line, "--max-steps", "40", "--decay-steps", "40"]
    result = run_program(*resume_line, preexec_fn=limit_file_size(size))
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "File too large" in result.stderr or "Unable to write" in result.stderr
    assert result.stderr.splitlines()[-1].startswith(("  → free some space", "  → use a disk"))
    assert run_program("generate", "to", "--run", "a", "--max-tokens", "3").returncode == 0
    resumed = run_program(*resume_line)
    assert resumed.returncode == 0, resumed.stderr
    assert not list(Path("runs/a").rglob(".*"))


def test_unwritable_folders_are_named(place: Path, capsys: Capture) -> None:
    Path("file").write_text("")
    for flag, line in (
        ("--runs-dir", [*TRAIN_ARGS, "--source", "data/words"]),
        ("--data-dir", ["prepare", "words.txt"]),
    ):
        assert "cannot write file/inside" in expect_error(capsys, *line, flag, "file/inside")


def test_unreadable_file_is_named(
    place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny_access(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    Path("other.txt").write_text("to be or not to be")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", deny_access)
        capsys.readouterr()
        assert cli.main(["prepare", "other.txt"]) == 2
    assert "cannot read other.txt: Permission denied" in capsys.readouterr().err


def test_two_processes_prepare_the_same_dataset(home: Path) -> None:
    """Both succeed, or one reports that the other is at work; the dataset is complete."""
    Path("my.txt").write_text("to be or not to be " * 20_000)
    line = [sys.executable, "-m", "mlxgpt", "prepare", "my.txt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == 0 or "another process is already preparing data/my" in err
    assert 0 in [process.returncode for process in processes]
    assert run_program("prepare", "my.txt").returncode == 0
    assert [p.name for p in Path("data").iterdir()] == ["my"]


# Ctrl-C.


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a text file and a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "my.txt").write_text("to be or not to be, that is the question " * 200)
    result = run_program(*LONG_TRAIN_ARGS, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("moment", ["preparing", "self-check", "sample at step", "step 70/150"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.exact_bits
def test_ctrl_c_at_any_moment(home: Path, uninterrupted: Path, moment: str, times: int) -> None:
    """There is no traceback, and rerunning the command resumes to the same weights."""
    shutil.copy(uninterrupted / "my.txt", home / "my.txt")
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxgpt", *LONG_TRAIN_ARGS],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        # If the tests run in the background, child processes inherit an ignored SIGINT.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(moment):
            break
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)  # simultaneous signals would be merged
    err = "".join(lines) + process.communicate()[1]
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Exception" not in err
    resumed = run_program(*LONG_TRAIN_ARGS)
    assert resumed.returncode == 0, resumed.stderr
    last = "runs/tier1-my/checkpoints/step-0000150/model.safetensors"
    assert (home / last).read_bytes() == (uninterrupted / last).read_bytes()
    assert np.fromfile(home / "data/my/train.bin", dtype="<u2").size == 7380


# Pipes.


def run_piped(line: str, consumer: str) -> bytes:
    """Pipe a command into `consumer`, which may not read it all, and check that it succeeds."""
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"'{sys.executable}' -m mlxgpt {line} | {consumer}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert b"Traceback" not in result.stderr
    assert b"Exception" not in result.stderr
    return result.stdout


def test_training_continues_when_its_output_is_closed(place: Path) -> None:
    line = " ".join([*TRAIN_ARGS, "--source", "data/words", "--run", "a", "--log-interval", "1"])
    run_piped(f"{line} 2>&1", "head -1")
    assert Path("runs/a/checkpoints/step-0000004/manifest.json").exists()


def test_generated_text_into_a_pipe_that_closes_early(place: Path) -> None:
    assert (
        len(run_piped("generate to --max-tokens 3000", "head -c 3")) == 3
    )  # bytes, so a character may be cut


@pytest.mark.parametrize("line", ["runs", "info", "eval", "generate to --samples 2", "--help"])
def test_output_into_a_pipe_that_is_not_read(
    place: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # so that output is flushed at exit
    run_piped(line, "true")
