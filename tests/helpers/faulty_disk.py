"""An in-process disk that fails at a chosen operation."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WRITE_OPERATIONS = ("fsync", "rename", "replace", "mkdir", "truncate", "unlink", "rmdir")
READ_OPERATIONS = ("stat", "listdir", "scandir", "read")


class FaultyDisk:
    """Counts the file operations under a folder and makes operation number `fail_at` fail once.

    A failing write writes half of its bytes, as on a disk that becomes full.

    Attributes:
        operations: (operation, file path) of each operation so far.
    """

    def __init__(self, folder: Path, errno_code: int = errno.ENOSPC) -> None:
        self.folder, self.errno_code = str(folder), errno_code
        self.fail_at: int | None = None
        self.operations: list[tuple[str, str]] = []
        self.failed_operation: tuple[str, str] | None = None
        self._descriptor_paths: dict[int, str] = {}

    def count_operation(self, name: str, path: object, *, has_filename: bool = True) -> None:
        """Count an operation, and raise OSError if it is number `fail_at`."""
        if isinstance(path, int):
            path, has_filename = self._descriptor_paths.get(path, ""), False
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(self.folder):
            return
        self.operations.append((name, os.fspath(path)))
        if len(self.operations) - 1 == self.fail_at:
            self.failed_operation = self.operations[-1]
            message = os.strerror(self.errno_code)
            raise OSError(self.errno_code, message, *([os.fspath(path)] if has_filename else []))

    @contextmanager
    def watching(self, fail_at: int | None = None) -> Iterator[FaultyDisk]:
        """Count all file operations of this process within this context."""
        self.fail_at, self.operations, self.failed_operation = fail_at, [], None
        with pytest.MonkeyPatch.context() as patch:
            for name in (*WRITE_OPERATIONS, *READ_OPERATIONS[:-1]):
                patch.setattr(os, name, self._wrap_call(name, getattr(os, name)))
            patch.setattr(os, "open", self._wrap_open(os.open))
            patch.setattr(os, "close", self._wrap_close(os.close))
            patch.setattr(io, "open", self._wrap_file_open(io.open))
            yield self

    def _wrap_call(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(path: Any = ".", *args: Any, **options: Any) -> Any:
            self.count_operation(name, path)
            return call(path, *args, **options)

        return wrapper

    def _wrap_open(self, call: Callable[..., int]) -> Callable[..., int]:
        def wrapper(path: Any, *args: Any, **options: Any) -> int:
            self.count_operation("open", path)
            descriptor = call(path, *args, **options)
            self._descriptor_paths[descriptor] = os.fspath(path)
            return descriptor

        return wrapper

    def _wrap_close(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def wrapper(descriptor: int) -> None:
            call(descriptor)  # the file is closed even if this operation fails
            self.count_operation(
                "close", self._descriptor_paths.pop(descriptor, None), has_filename=False
            )

        return wrapper

    def _wrap_file_open(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not os.fspath(path).startswith(self.folder):
                return call(path, mode, *args, **options)
            self.count_operation("open", path)
            raw_mode = mode.replace("b", "").replace("t", "")
            raw = _File(self, path, raw_mode)
            buffer = io.BufferedReader(raw) if raw_mode == "r" else io.BufferedWriter(raw)
            if "b" in mode:
                return buffer
            option_names = ("buffering", "encoding", "errors", "newline")
            text_options = {**dict(zip(option_names, args, strict=False)), **options}
            text_options.pop("buffering", None)
            return io.TextIOWrapper(buffer, **text_options)

        return wrapper


class _File(io.FileIO):
    def __init__(self, disk: FaultyDisk, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self._disk, self._path = disk, os.fspath(path)

    def write(self, content: Any, /) -> int:
        try:
            self._disk.count_operation("write", self._path, has_filename=False)
        except OSError:
            super().write(bytes(content)[: len(content) // 2])
            raise
        return super().write(content)

    def readinto(self, buffer: Any, /) -> int:
        self._disk.count_operation("read", self._path, has_filename=False)
        return super().readinto(buffer) or 0

    def readall(self) -> bytes:
        self._disk.count_operation("read", self._path, has_filename=False)
        return super().readall()
