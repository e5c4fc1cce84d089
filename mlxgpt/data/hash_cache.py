"""What was found in files that were read whole, kept beside them in verified.json, so that a start
need not read 18 GB again to hash them.

A file is taken to be the one that was read as long as its size, time of change, inode and device
are the same. What a disk loses under these goes unnoticed until it is read whole again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

CACHE_FORMAT_VERSION = 1
CACHE_FILENAME = "verified.json"

CachedResult = dict[str, Any]


class HashCache:
    """The memory of one folder.

    Args:
        folder: where verified.json lies, if there is one; a damaged one is as good as none.
        reread: read everything again.
    """

    def __init__(self, folder: Path, *, reread: bool = False) -> None:
        self._folder, self._reread = folder, reread
        self._entries: dict[str, CachedResult] = {}
        self._dirty = False
        if not files.is_file(folder / CACHE_FILENAME):  # a pipe would be waited for
            return
        # Another OSError is raised: what cannot be read now must not be written over.
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, UserError):
            entries = files.read_checksummed(folder / CACHE_FILENAME, CACHE_FORMAT_VERSION)["known"]
            if isinstance(entries, dict):
                self._entries = entries

    def get_or_compute(
        self, name: str, paths: Sequence[Path], compute: Callable[[], CachedResult]
    ) -> CachedResult:
        """What `compute` finds in some files: found now, or when they were read before.

        Args:
            name: to remember it by.
            compute: its result has to be such as JSON can keep.

        Raises:
            OSError: if a file cannot be read.
        """
        stamp = _file_stamp(paths)
        entry = self._entries.get(name)
        if not self._reread and isinstance(entry, dict) and entry.get("stamp") == stamp:
            result = entry.get("found")
            if isinstance(result, dict):
                return result
        result = compute()
        if _file_stamp(paths) == stamp:  # it was not changed under our eyes
            self._entries[name] = {"stamp": stamp, "found": result}
            self._dirty = True
        return result

    def lookup(self, name: str) -> CachedResult:
        """What was found before, whether or not the files are still there; {} where nothing was."""
        entry = self._entries.get(name)
        result = entry.get("found") if isinstance(entry, dict) else None
        return result if isinstance(result, dict) else {}

    def save(self, folder: Path | None = None) -> None:
        """Write what is new, into the memory's folder or another; where that cannot be written,
        the files will be read again.
        """
        if self._dirty:
            tree = {"format": CACHE_FORMAT_VERSION, "known": self._entries}
            with contextlib.suppress(OSError):
                files.write_atomically(
                    (folder or self._folder) / CACHE_FILENAME, files.dump_checksummed(tree)
                )


def _file_stamp(paths: Sequence[Path]) -> str:
    stats = [path.stat() for path in paths]
    tree = [[s.st_size, s.st_mtime_ns, s.st_ino, s.st_dev] for s in stats]
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()
