"""A disk that fails at a chosen operation, for tests in this process."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WRITING = ("fsync", "rename", "replace", "mkdir", "truncate", "unlink", "rmdir")
READING = ("stat", "listdir", "scandir", "read")


class FaultyDisk:
    """Counts the operations on files under a folder, and fails number `fail_at`, once.

    A write that fails leaves half of its bytes, as on a disk that becomes full.

    Attributes:
        sites: each operation so far: its name, and the file's.
    """

    def __init__(self, folder: Path, number: int = errno.ENOSPC) -> None:
        self.folder, self.number = str(folder), number
        self.fail_at: int | None = None
        self.sites: list[tuple[str, str]] = []
        self.failed: tuple[str, str] | None = None
        self._names: dict[int, str] = {}

    def operation(self, name: str, path: object, *, named: bool = True) -> None:
        """Count an operation, and fail it where it is its turn."""
        if isinstance(path, int):
            path, named = self._names.get(path, ""), False
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(self.folder):
            return
        self.sites.append((name, os.fspath(path)))
        if len(self.sites) - 1 == self.fail_at:
            self.failed = self.sites[-1]
            reason = os.strerror(self.number)
            raise OSError(self.number, reason, *([os.fspath(path)] if named else []))

    @contextmanager
    def plugged_in(self, fail_at: int | None = None) -> Iterator[FaultyDisk]:
        """Watch all operations of this process."""
        self.fail_at, self.sites, self.failed = fail_at, [], None
        with pytest.MonkeyPatch.context() as patch:
            for name in (*WRITING, *READING[:-1]):
                patch.setattr(os, name, self._watched(name, getattr(os, name)))
            patch.setattr(os, "open", self._opened(os.open))
            patch.setattr(os, "close", self._closed(os.close))
            patch.setattr(io, "open", self._file_opened(io.open))
            yield self

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            self.operation(name, path)
            return call(path, *arguments, **options)

        return watched

    def _opened(self, call: Callable[..., int]) -> Callable[..., int]:
        def watched(path: Any, *arguments: Any, **options: Any) -> int:
            self.operation("open", path)
            descriptor = call(path, *arguments, **options)
            self._names[descriptor] = os.fspath(path)
            return descriptor

        return watched

    def _closed(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def watched(descriptor: int) -> None:
            call(descriptor)  # it is closed also where that fails
            self.operation("close", self._names.pop(descriptor, None), named=False)

        return watched

    def _file_opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not os.fspath(path).startswith(self.folder):
                return call(path, mode, *arguments, **options)
            self.operation("open", path)
            kind = mode.replace("b", "").replace("t", "")
            raw = _File(self, path, kind)
            buffer = io.BufferedReader(raw) if kind == "r" else io.BufferedWriter(raw)
            if "b" in mode:
                return buffer
            names = ("buffering", "encoding", "errors", "newline")
            given = {**dict(zip(names, arguments, strict=False)), **options}
            given.pop("buffering", None)
            return io.TextIOWrapper(buffer, **given)

        return watched


class _File(io.FileIO):
    def __init__(self, disk: FaultyDisk, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self._disk, self._path = disk, os.fspath(path)

    def write(self, content: Any, /) -> int:
        try:
            self._disk.operation("write", self._path, named=False)
        except OSError:
            super().write(bytes(content)[: len(content) // 2])
            raise
        return super().write(content)

    def readinto(self, buffer: Any, /) -> int:
        self._disk.operation("read", self._path, named=False)
        return super().readinto(buffer) or 0

    def readall(self) -> bytes:
        self._disk.operation("read", self._path, named=False)
        return super().readall()
