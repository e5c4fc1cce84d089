"""Caches the hashes and counts of large files in the data folder's verified.json, so that opening a
dataset does not read 18 GB again.

A file counts as unchanged while its size, modification time, inode and device are the same. Damage
that changes none of these is found only when the file is read whole again.
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
    """The cached results for the files of one folder.

    Args:
        folder: the folder of verified.json, which may be missing; a damaged one is ignored.
        reread: compute everything again.
    """

    def __init__(self, folder: Path, *, reread: bool = False) -> None:
        self._folder, self._reread = folder, reread
        self._entries: dict[str, CachedResult] = {}
        self._dirty = False
        if not files.is_file(folder / CACHE_FILENAME):  # opening a pipe could block
            return
        # Another OSError is raised: a file that cannot be read now must not be overwritten.
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, UserError):
            entries = files.read_checksummed(folder / CACHE_FILENAME, CACHE_FORMAT_VERSION)["known"]
            if isinstance(entries, dict):
                self._entries = entries

    def get_or_compute(
        self, name: str, paths: Sequence[Path], compute: Callable[[], CachedResult]
    ) -> CachedResult:
        """The result of `compute`, which reads some files; from the cache if they did not change.

        Args:
            name: the key in the cache.
            compute: its result must be serializable as JSON.

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
        if _file_stamp(paths) == stamp:  # the files did not change while they were read
            self._entries[name] = {"stamp": stamp, "found": result}
            self._dirty = True
        return result

    def lookup(self, name: str) -> CachedResult:
        """The cached result, whether or not the files still exist; {} if there is none."""
        entry = self._entries.get(name)
        result = entry.get("found") if isinstance(entry, dict) else None
        return result if isinstance(result, dict) else {}

    def save(self, folder: Path | None = None) -> None:
        """Write new results, to the cache's own folder or another. If that fails, the files are
        read again the next time.
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
