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

FORMAT = 1
NAME = "verified.json"

Found = dict[str, Any]


class Verified:
    """The memory of one folder.

    Args:
        folder: where verified.json lies, if there is one; a damaged one is as good as none.
        reread: read everything again.
    """

    def __init__(self, folder: Path, *, reread: bool = False) -> None:
        self._folder, self._reread = folder, reread
        self._known: dict[str, Found] = {}
        self._changed = False
        if not files.is_file(folder / NAME):  # a pipe would be waited for
            return
        # Another OSError is raised: what cannot be read now must not be written over.
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, UserError):
            known = files.read_sealed(folder / NAME, FORMAT)["known"]
            if isinstance(known, dict):
                self._known = known

    def once(self, name: str, paths: Sequence[Path], find: Callable[[], Found]) -> Found:
        """What `find` finds in some files: found now, or when they were read before.

        Args:
            name: to remember it by.
            find: its result has to be such as JSON can keep.

        Raises:
            OSError: if a file cannot be read.
        """
        stamp = _stamp(paths)
        entry = self._known.get(name)
        if not self._reread and isinstance(entry, dict) and entry.get("stamp") == stamp:
            found = entry.get("found")
            if isinstance(found, dict):
                return found
        found = find()
        if _stamp(paths) == stamp:  # it was not changed under our eyes
            self._known[name] = {"stamp": stamp, "found": found}
            self._changed = True
        return found

    def recall(self, name: str) -> Found:
        """What was found before, whether or not the files are still there; {} where nothing was."""
        entry = self._known.get(name)
        found = entry.get("found") if isinstance(entry, dict) else None
        return found if isinstance(found, dict) else {}

    def save(self, folder: Path | None = None) -> None:
        """Write what is new, into the memory's folder or another; where that cannot be written,
        the files will be read again.
        """
        if self._changed:
            tree = {"format": FORMAT, "known": self._known}
            with contextlib.suppress(OSError):
                files.write_atomically((folder or self._folder) / NAME, files.sealed(tree))


def _stamp(paths: Sequence[Path]) -> str:
    stats = [path.stat() for path in paths]
    tree = [[s.st_size, s.st_mtime_ns, s.st_ino, s.st_dev] for s in stats]
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()
