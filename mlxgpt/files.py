"""Small files that are whole or not there, and that tell when they were changed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxgpt.errors import UserError

SEAL = "seal"


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that a reader, or a crash, sees the old or the new one whole."""
    scratch = path.with_name(f".{path.name}.new")
    try:
        scratch.write_text(text, encoding="utf-8")
        sync(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make the disk itself hold a file or folder, not only the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            # On macOS fsync leaves data in the drive's own cache; this does not.
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def only_one(path: Path, doing: str) -> Iterator[None]:
    """While this process works on a folder, no other one does. The system lets go when the process
    ends, however it ends.

    Args:
        path: the folder, which need not be there; the lock lies beside it.
        doing: what an other process would be doing, such as "training".

    Raises:
        UserError: if another process works on it, or nothing can be written there.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError as error:
        raise UserError(
            f"cannot write in {path.parent}: {error.strerror}", "choose another folder."
        ) from error
    with file:
        with contextlib.suppress(OSError):  # some file systems have no locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is {doing} {path} right now",
                    "wait until it is done, or choose another name.",
                ) from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(tree: Mapping[str, Any]) -> str:
    """A JSON object as text, with the hash of everything in it as its `seal`."""
    return json.dumps({**tree, SEAL: _seal(tree)}, indent=1) + "\n"


def read_sealed(path: Path, newest: int) -> dict[str, Any]:
    """Read what `sealed` made, the seal left out.

    Args:
        newest: the newest `format` that is understood.

    Raises:
        UserError: if a newer mlxgpt wrote it.
        OSError: if it cannot be read.
        ValueError: if it is not what was written.
    """
    tree = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ValueError("it is no JSON object")
    format = tree.get("format")
    if isinstance(format, int) and format > newest:
        raise UserError(
            f"{path.parent} was written by a newer mlxgpt (format {format})",
            "upgrade mlxgpt: pip install -U mlxgpt",
        )
    if tree.pop(SEAL, None) != _seal(tree):
        raise ValueError("it is not what was written (its seal is broken)")
    return tree


def _seal(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
