"""Logs that cannot be written are ignored; results that cannot be written are an error."""

from __future__ import annotations

import errno
import io
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from mlxgpt.cli import streams
from tests.helpers.commands import ROOT, TRAIN_ARGS, read_tree

pytestmark = pytest.mark.usefixtures("no_check")
DEV_FULL = Path("/dev/full")
needs_dev_full = pytest.mark.skipif(not DEV_FULL.exists(), reason="only Linux has /dev/full")


class FaultyStream(io.RawIOBase):
    """A raw stream whose writes fail with errno `number` while it is set."""

    def __init__(self, number: int) -> None:
        self.number: int | None = number
        self.written = b""

    def writable(self) -> bool:
        return True

    def write(self, content: Any, /) -> int:
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        self.written += bytes(content)
        return len(content)


@pytest.fixture(params=[errno.ENOSPC, errno.EIO, errno.EPIPE])
def faulty_stream(request: pytest.FixtureRequest) -> Iterator[FaultyStream]:
    raw = FaultyStream(request.param)
    yield raw
    raw.number = None


def test_log_continues_when_writing_works_again(faulty_stream: FaultyStream) -> None:
    log = io.TextIOWrapper(io.BufferedWriter(faulty_stream), line_buffering=True)
    stream = streams.StderrStream.wrap(log)
    for n in range(3000):  # more than fits in the buffer
        print(f"line {n}", file=stream)
    faulty_stream.number = None
    print("the last line", file=stream)
    stream.close()
    assert faulty_stream.written.endswith(b"the last line\n")


def test_failed_write_of_a_result_names_standard_output(faulty_stream: FaultyStream) -> None:
    stdout = io.TextIOWrapper(io.BufferedWriter(faulty_stream))
    stream = streams.StdoutStream.wrap(stdout)
    stream.write("a result")
    with pytest.raises(OSError, match="standard output") as error:
        stream.flush()
    assert error.value.errno == faulty_stream.number
    faulty_stream.number = None
    stream.close()


def test_writing_to_a_closed_stdout_is_ignored() -> None:
    with streams.StdoutStream.wrap(None) as stream:
        stream.write("nobody reads this")


def command(*line: str) -> list[str]:
    return [sys.executable, "-m", "mlxgpt", *line]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


@needs_dev_full
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("line", ["runs", "info --json", "generate to", "--version"])
def test_result_on_a_full_disk_is_an_error(place: Path, line: str, buffered: bool) -> None:
    if line == "--version" and not buffered:
        pytest.skip("argparse itself ignores errors there")
    variables = environment(PYTHONUNBUFFERED="" if buffered else "1")
    with DEV_FULL.open("w") as stdout:
        result = subprocess.run(
            command(*line.split()),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=variables,
        )
    assert result.returncode == 2
    problem, remedy = result.stderr.splitlines()[-2:]
    assert problem == "mlxgpt: standard output: No space left on device"
    assert remedy.startswith("  → redirect it elsewhere")


@needs_dev_full
@pytest.mark.exact_bits
def test_training_with_an_unwritable_log_is_bit_exact(place: Path) -> None:
    assert train_with_stderr(place, subprocess.DEVNULL) == train_with_stderr(
        place, DEV_FULL.open("w")
    )


@pytest.mark.exact_bits
def test_training_without_its_terminal_is_bit_exact(place: Path) -> None:
    terminal, stderr = pty.openpty()
    os.close(terminal)
    try:
        with pytest.raises(OSError, match="Input/output error"):
            os.write(stderr, b"x")
        checkpoints = train_with_stderr(place, stderr)
    finally:
        os.close(stderr)
    assert checkpoints == train_with_stderr(place, subprocess.DEVNULL)


def train_with_stderr(place: Path, stderr: Any) -> dict[str, bytes]:
    """Train with this stderr and return the checkpoint files."""
    line = [*TRAIN_ARGS, "--source", "data/words", "--run", "new", "--log-interval", "1"]
    subprocess.run(command(*line), stderr=stderr, check=True, env=environment())
    if hasattr(stderr, "close"):
        stderr.close()
    checkpoints = read_tree(place / "runs" / "new" / "checkpoints")
    (place / "runs" / "new").rename(place / f"seen-{len(list(place.iterdir()))}")
    return checkpoints


class _ShortWriteStream(io.RawIOBase):
    """Writes half of each request, as a nearly full disk may."""

    def __init__(self) -> None:
        self.written = b""

    def writable(self) -> bool:
        return True

    def write(self, content: Any, /) -> int:
        part = bytes(content)[: max(1, len(content) // 2)]
        self.written += part
        return len(part)


def test_unbuffered_result_is_written_completely() -> None:
    raw = _ShortWriteStream()
    unbuffered = io.TextIOWrapper(cast(Any, raw), "utf-8", write_through=True)
    stream = streams.StdoutStream.wrap(unbuffered)
    stream.write('{"loss": 2.5}\n')
    stream.flush()
    assert raw.written == b'{"loss": 2.5}\n'
