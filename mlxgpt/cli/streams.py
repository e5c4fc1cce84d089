"""Standard output and standard error that handle failing writes: a full disk, a closed terminal."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any, Self, TextIO, cast

from mlxgpt.utils import files

STDOUT_NAME = "standard output"  # its name in errors


class _StandardStream(io.TextIOWrapper):
    @classmethod
    def wrap(cls, stream: TextIO | None) -> Self:
        """Wrap a stream: characters that a terminal cannot show become question marks."""
        if stream is None:  # closed before the program started
            return cls(Path(os.devnull).open("wb"))
        binary: Any = stream.buffer
        is_unbuffered = isinstance(binary, io.RawIOBase)  # PYTHONUNBUFFERED
        if is_unbuffered:  # a raw stream may write only a part
            binary = io.BufferedWriter(cast(io.RawIOBase, binary))
        line_buffering = is_unbuffered or getattr(stream, "line_buffering", False)
        return cls(binary, stream.encoding, errors="replace", line_buffering=line_buffering)


class StdoutStream(_StandardStream):
    """Standard output: a failing write is an error, which names the stream."""

    def write(self, text: str, /) -> int:
        with files.add_filename_to_errors(Path(STDOUT_NAME)):
            return super().write(text)

    def flush(self) -> None:
        with files.add_filename_to_errors(Path(STDOUT_NAME)):
            super().flush()


class StderrStream(_StandardStream):
    """Standard error: failing writes are ignored, since a log must not end training. Buffered text
    is retried with the next message.
    """

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            return


def install_streams() -> None:
    """Replace sys.stdout and sys.stderr by streams that report or ignore failing writes."""
    sys.stdout, sys.stderr = StdoutStream.wrap(sys.stdout), StderrStream.wrap(sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are not UTF-8 are refused later
        sys.stdin.reconfigure(errors="surrogateescape")


def redirect_to_devnull(stream: TextIO) -> None:
    """Redirect a stream's file descriptor to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
