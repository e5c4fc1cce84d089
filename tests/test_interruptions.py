"""A full disk, another process, Ctrl-C, an output that nobody reads: nothing is lost."""

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

pytestmark = pytest.mark.usefixtures("no_check")  # the self-check has tests of its own


def limit_file_size(size: int) -> Callable[[], None]:
    """No file may grow beyond `size` bytes: as on a disk that is full, writing fails."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_is_full_while_preparing(home: Path) -> None:
    Path("my.txt").write_text("to be or not to be " * 500)
    result = run_program("prepare", "my.txt", preexec_fn=limit_file_size(10_000))
    assert result.returncode == 2
    assert "mlxgpt: data/.my.new/train.bin: File too large\n  → " in result.stderr
    assert "run the same command again to resume from here" in result.stderr
    assert not (home / "data" / "my").exists()
    assert run_program("prepare", "my.txt").returncode == 0


@pytest.mark.parametrize("size", [300, 2_000, 5_000])
def test_a_disk_that_is_full_while_training(home: Path, size: int) -> None:
    """Wherever the room ends, in metrics or in a checkpoint: what was saved can be resumed."""
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


def test_folders_that_cannot_be_written(place: Path, capsys: Capture) -> None:
    Path("file").write_text("")
    for flag, line in (
        ("--runs-dir", [*TRAIN_ARGS, "--source", "data/words"]),
        ("--data-dir", ["prepare", "words.txt"]),
    ):
        assert "cannot write file/inside" in expect_error(capsys, *line, flag, "file/inside")


def test_a_file_that_cannot_be_read(
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


def test_two_processes_want_the_same_data(home: Path) -> None:
    """Both get it, or one is told to wait; what is there in the end is whole."""
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


# Being interrupted.


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "my.txt").write_text("to be or not to be, that is the question " * 200)
    result = run_program(*LONG_TRAIN_ARGS, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("moment", ["preparing", "self-check", "sample at step", "step 70/150"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.exact_bits
def test_ctrl_c_at_any_moment(home: Path, uninterrupted: Path, moment: str, times: int) -> None:
    """Wherever it hits (preparing, checking, training, saving), there is no traceback, and the
    same command resumes to the same weights.
    """
    shutil.copy(uninterrupted / "my.txt", home / "my.txt")
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxgpt", *LONG_TRAIN_ARGS],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        # Whoever starts the tests in the background has Ctrl-C ignored, and so have its children.
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
        time.sleep(0.01)  # two signals at once are one
    err = "".join(lines) + process.communicate()[1]
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Exception" not in err
    resumed = run_program(*LONG_TRAIN_ARGS)
    assert resumed.returncode == 0, resumed.stderr
    last = "runs/tier1-my/checkpoints/step-0000150/model.safetensors"
    assert (home / last).read_bytes() == (uninterrupted / last).read_bytes()
    assert np.fromfile(home / "data/my/train.bin", dtype="<u2").size == 7380


# Terminals.


def run_piped(line: str, consumer: str) -> bytes:
    """A command whose output another one reads, or not; it must not complain."""
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


def test_a_training_that_nobody_watches_goes_on(place: Path) -> None:
    line = " ".join([*TRAIN_ARGS, "--source", "data/words", "--run", "a", "--log-interval", "1"])
    run_piped(f"{line} 2>&1", "head -1")
    assert Path("runs/a/checkpoints/step-0000004/manifest.json").exists()


def test_a_stream_that_is_closed_early(place: Path) -> None:
    assert (
        len(run_piped("generate to --max-tokens 3000", "head -c 3")) == 3
    )  # bytes: half a letter too


@pytest.mark.parametrize("line", ["runs", "info", "eval", "generate to --samples 2", "--help"])
def test_output_that_nobody_reads(place: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # or nothing is left for the end
    run_piped(line, "true")
