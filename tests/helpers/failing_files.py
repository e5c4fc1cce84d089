"""File operations that fail, for tests."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mlxgpt.utils import files

# Of a disk, of a limit, of permissions: none says that there is nothing.
ERRNOS = [errno.EIO, errno.EMFILE, errno.EACCES]


def make_os_error(number: int, path: object) -> OSError:
    return OSError(number, os.strerror(number), str(path))


def failing_open(
    patch: pytest.MonkeyPatch, name: str, number: int, *, after: int = 0
) -> list[Path]:
    """Let `Path.open` of files of a name fail, but for the first `after` times; the failed ones."""
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
    """Let the sync of a folder of this name fail, once."""
    failed_paths: list[Path] = []
    original = files.fsync_path

    def sync_or_fail(path: Path) -> None:
        if path.name == folder and not failed_paths:
            failed_paths.append(path)
            raise make_os_error(errno.EIO, path)
        original(path)

    patch.setattr(files, "fsync_path", sync_or_fail)
