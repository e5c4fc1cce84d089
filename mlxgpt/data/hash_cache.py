"""Cache of file hashes and counts in a data folder's verified.json, so that opening a dataset does
not read 18 GB again.

A file counts as unchanged while its size, modification time, inode and device are the same. Damage
that changes none of these is detected only by `--verify`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError

CACHE_FORMAT_VERSION = 1
CACHE_FILENAME = "verified.json"

CachedResult = dict[str, Any]


class HashCache:
    """Cached hashes and counts for the files of one folder.

    Args:
        folder: folder of verified.json; a missing or damaged file is ignored, and so is one in a
            newer format, which is not overwritten.
        reread: recompute everything.
    """

    def __init__(self, folder: Path, *, reread: bool = False) -> None:
        self._folder, self._reread = folder, reread
        self._entries: dict[str, CachedResult] = {}
        self._dirty = self._is_newer = False
        if not files.is_file(folder / CACHE_FILENAME):  # opening a pipe could block
            return
        # Other OSErrors are raised: a file that cannot be read now must not be overwritten.
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            try:
                tree = json_files.read_checksummed(folder / CACHE_FILENAME, CACHE_FORMAT_VERSION)
            except UserError:
                self._is_newer = True
                return
            if isinstance(tree["known"], dict):
                self._entries = tree["known"]

    def get_or_compute(
        self, name: str, paths: Sequence[Path], compute: Callable[[], CachedResult]
    ) -> CachedResult:
        """Return the cached result for some files, or call `compute` if they have changed.

        Args:
            name: key in the cache.
            compute: reads the files; its result must be JSON serializable.

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
        """Return the cached result even if the files no longer exist; {} if there is none."""
        entry = self._entries.get(name)
        result = entry.get("found") if isinstance(entry, dict) else None
        return result if isinstance(result, dict) else {}

    def save(self, folder: Path | None = None) -> None:
        """Write new results to `folder` (default: the cache's own). If that fails, the files are
        read again next time.
        """
        if self._dirty and not self._is_newer:
            tree = {"format": CACHE_FORMAT_VERSION, "known": self._entries}
            with contextlib.suppress(OSError):
                files.write_atomically(
                    (folder or self._folder) / CACHE_FILENAME, json_files.dump_checksummed(tree)
                )


def _file_stamp(paths: Sequence[Path]) -> str:
    stats = [path.stat() for path in paths]
    tree = [[s.st_size, s.st_mtime_ns, s.st_ino, s.st_dev] for s in stats]
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()
