"""File operations that fail, for tests."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mlxgpt.utils import files

# Of a disk, of a limit, of permissions: none says that there is nothing.
NUMBERS = [errno.EIO, errno.EMFILE, errno.EACCES]


def error(number: int, path: object) -> OSError:
    return OSError(number, os.strerror(number), str(path))


def failing_open(
    patch: pytest.MonkeyPatch, name: str, number: int, *, after: int = 0
) -> list[Path]:
    """Let `Path.open` of files of a name fail, but for the first `after` times; the failed ones."""
    real, calls, failed = Path.open, [], []

    def opened(path: Path, *given: Any, **named: Any) -> Any:
        if path.name == name:
            calls.append(path)
            if len(calls) > after:
                failed.append(path)
                raise error(number, path)
        return real(path, *given, **named)

    patch.setattr(Path, "open", opened)
    return failed


def failing_sync(patch: pytest.MonkeyPatch, folder: str) -> None:
    """Let the sync of a folder of this name fail, once."""
    failed: list[Path] = []
    real = files.fsync_path

    def sync(path: Path) -> None:
        if path.name == folder and not failed:
            failed.append(path)
            raise error(errno.EIO, path)
        real(path)

    patch.setattr(files, "fsync_path", sync)
