"""Find the text files in a folder, ignoring leftovers of file managers, editors and archives."""

from __future__ import annotations

import errno
import glob
import logging
import os
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path

from mlxgpt.utils import files

logger = logging.getLogger(__name__)


def find_text_files(folder: Path, suffixes: Container[str]) -> list[Path]:
    """Find all files with one of the suffixes in a folder and its subfolders, sorted. Logs skipped
    files.

    Args:
        suffixes: lowercase, with the dot.
    """
    text_paths: list[Path] = []
    skipped: Counter[str] = Counter()
    problems: list[str] = []

    def on_walk_error(error: OSError) -> None:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ENOENT):
            raise error  # from the disk or a limit: skipping files would change the dataset
        problems.append(f"{error.filename} cannot be read ({error.strerror})")

    for parent, folders, names in os.walk(folder, onerror=on_walk_error):
        folders[:] = [name for name in folders if not is_ignored(name)]
        links = [path for name in folders if (path := Path(parent, name)).is_symlink()]
        problems += [f"{path} is a link to a folder" for path in links]
        for path in (Path(parent, name) for name in names):
            suffix = path.suffix.lower()
            if is_ignored(path.name):
                skipped["hidden"] += suffix in suffixes
            elif path.is_symlink() and not files.exists(path):
                problems.append(f"{path} is a broken link to {path.readlink()}")
            elif suffix in suffixes and files.is_file(path):
                text_paths.append(path)
            else:
                skipped[suffix or "without extension"] += 1
    counts = sorted((-count, kind) for kind, count in skipped.items() if count)
    kinds = [f"{-count:,} {kind}" for count, kind in counts]
    notes = [line for lines in (kinds, sorted(problems)) for line in _truncate_list(lines)]
    if notes:
        logger.info(f"skipped in {folder}: {', '.join(notes)}")
    return sorted(text_paths)


# In addition to names that start with a dot, such as .DS_Store, .git and .a.txt.swp.
IGNORED_NAMES = {
    *("__MACOSX", "__pycache__", "lost+found"),
    *("Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information"),
    *("@eaDir", "#recycle", "#snapshot"),  # network drives
    "Icon\r",  # folder icon on macOS
}


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden, or left behind by a program."""
    is_backup = name.startswith("~$") or name.endswith("~") or name[:1] + name[-1:] == "##"
    return name.startswith(".") or is_backup or name in IGNORED_NAMES


MAX_LISTED = 8  # kinds of files, or problems, in one log line


def _truncate_list(lines: list[str]) -> list[str]:
    return lines if len(lines) <= MAX_LISTED else [*lines[:MAX_LISTED], "…"]


def expand_pattern(pattern: Path) -> list[Path]:
    """Expand a pattern with `*`, `?`, `[…]` or `**` to sorted paths, like `glob.glob`: hidden names
    match only if the pattern starts with a dot. Raises like `files.list_matching`.
    """
    paths = [Path(pattern.anchor)]
    for part in pattern.relative_to(pattern.anchor).parts:
        if part == "**":
            paths = [
                descendant
                for path in paths
                if files.is_folder(path)
                for descendant in _walk_visible(path)
            ]
        elif glob.has_magic(part):
            entries = [entry for path in paths for entry in files.list_matching(path, part)]
            paths = [e for e in entries if part.startswith(".") or not e.name.startswith(".")]
        else:
            paths = [path / part for path in paths]
    return sorted({path for path in paths if files.lexists(path)})


def _walk_visible(path: Path) -> Iterator[Path]:
    """Yield a path and everything below it, except hidden names."""
    yield path
    for entry in files.list_matching(path, "[!.]*"):
        yield from _walk_visible(entry)
