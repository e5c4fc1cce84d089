"""File operations that fail on demand."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mlxgpt.utils import files

# Errors of a disk, a limit, or permissions; none of them means that the file is missing.
ERRNOS = [errno.EIO, errno.EMFILE, errno.EACCES]


def make_os_error(number: int, path: object) -> OSError:
    return OSError(number, os.strerror(number), str(path))


def failing_open(
    patch: pytest.MonkeyPatch, name: str, number: int, *, after: int = 0
) -> list[Path]:
    """Make `Path.open` fail for files of this name after `after` successful calls; return the list
    of failed paths.
    """
    original, calls, failed_paths = Path.open, [], []

    def open_or_fail(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == name:
            calls.append(path)
            if len(calls) > after:
                failed_paths.append(path)
                raise make_os_error(number, path)
        return original(path, *args, **kwargs)

    patch.setattr(Path, "open", open_or_fail)
    return failed_paths


def failing_sync(patch: pytest.MonkeyPatch, folder: str) -> None:
    """Make the sync of a folder of this name fail once."""
    failed_paths: list[Path] = []
    original = files.fsync_path

    def sync_or_fail(path: Path) -> None:
        if path.name == folder and not failed_paths:
            failed_paths.append(path)
            raise make_os_error(errno.EIO, path)
        original(path)

    patch.setattr(files, "fsync_path", sync_or_fail)
