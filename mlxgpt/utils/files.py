"""Small files: written atomically, checksummed, locked, read with a size limit; predicates that
raise if a path cannot be read.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import fnmatch
import functools
import hashlib
import json
import math
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxgpt.utils.errors import UserError

_FREE_SPACE = "free some space, and run the same command again."
_CHECK_DISK = "check the disk and its connection, and run the same command again."
_CHECK_PERMISSIONS = "check the permissions of the file and its folder."
_RAISE_LIMIT = "close other programs, or raise the limit on open files: ulimit -n 4096"
# By errno; a network folder that fails answers with several of them.
REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EIO: _CHECK_DISK,
    errno.ENXIO: _CHECK_DISK,
    errno.ENODEV: _CHECK_DISK,
    errno.ESTALE: _CHECK_DISK,
    errno.ETIMEDOUT: _CHECK_DISK,
    errno.EACCES: _CHECK_PERMISSIONS,
    errno.EPERM: _CHECK_PERMISSIONS,
    errno.EROFS: "choose a folder on a writable disk.",
    errno.EMFILE: _RAISE_LIMIT,
    errno.ENFILE: _RAISE_LIMIT,
    errno.ENOMEM: "close other programs to free memory, and run the same command again.",
    errno.ENAMETOOLONG: "use a shorter name.",
    errno.EFBIG: "use a disk that supports larger files, or raise the limit: ulimit -f unlimited",
    errno.ENOTCONN: _CHECK_DISK,
}


def exists(path: Path) -> bool:
    """Whether there is anything of that name; a link that leads nowhere does not count.

    Raises:
        OSError: if that cannot be known. From Python 3.14 on, `Path.exists`, `is_file` and
            `is_dir` return False then, and a run that cannot be read would look like a new one.
    """
    return _mode(path) is not None


def is_file(path: Path) -> bool:
    """Whether there is a regular file of that name, or a link to one; raises as `exists`."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_folder(path: Path) -> bool:
    """Whether there is a folder of that name, or a link to one; raises as `exists`."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def lexists(path: Path) -> bool:
    """Whether there is anything of that name, a link that leads nowhere too; raises as `exists`."""
    return _mode(path, follow_symlinks=False) is not None


def _mode(path: Path, *, follow_symlinks: bool = True) -> int | None:
    try:
        return path.stat(follow_symlinks=follow_symlinks).st_mode
    except ValueError:  # a NUL in the name
        return None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def list_matching(folder: Path, pattern: str) -> list[Path]:
    """The entries of a folder whose names match a shell pattern, sorted; none without the folder.

    Raises:
        OSError: if it cannot be read. `Path.glob` and `glob.glob` find nothing there then.
    """
    try:
        return sorted(p for p in folder.iterdir() if fnmatch.fnmatchcase(p.name, pattern))
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextlib.contextmanager
def add_filename_to_errors(path: Path) -> Iterator[None]:
    """Name the file in an OSError that does not: reads, writes and fsync do not know names."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def to_user_error(error: OSError, action: str, path: Path, remedy: str = "") -> UserError:
    """What to tell the user about a failed file operation: the errno decides the remedy.

    Args:
        action: a verb, such as "read" or "write".
        path: named where the error itself names no file.
        remedy: for errors that have no remedy of their own, such as a missing file.
    """
    problem = f"cannot {action} {error.filename or path}: {error.strerror or error}"
    return UserError(problem, find_remedy(error, remedy))


def find_remedy(error: Exception, default: str = "") -> str:
    """What to do about an error, by its errno; `default` where that has no remedy."""
    error_number = getattr(error, "errno", None) or 0
    return REMEDIES.get(error_number, default or "check the file and its folder.")


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that a reader, or a crash, sees the old or the new one whole."""
    scratch = path.with_name(f".{path.name}.new")
    try:
        # Bytes of a name that are not UTF-8, which only files for people may have, are escaped.
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
        fsync_path(scratch)
        scratch.replace(path)
        fsync_path(path.parent)
    except OSError as error:
        error.filename = str(path)  # the name that a person knows
        raise
    finally:
        with contextlib.suppress(OSError):  # usually renamed by now
            scratch.unlink()


def iter_cache_folders() -> Iterator[Path]:
    """Folders for what can be made again, that nobody else writes in: the user's cache folder for
    mlxgpt and, where that will not do, one that goes when this process does.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    with contextlib.suppress(OSError):
        folder = Path(base) / "mlxgpt"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    with contextlib.suppress(OSError):
        yield _make_temp_folder()


@functools.cache
def _make_temp_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="mlxgpt-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


TRASH_SUFFIX = ".gone"  # of a folder's name while it is being deleted


def remove_folder(folder: Path) -> None:
    """Delete a folder, if it exists: an interruption leaves it whole, or nothing of that name. What
    an earlier one left of it goes, too.
    """
    trash = folder.with_name(f".{folder.name}{TRASH_SUFFIX}")
    shutil.rmtree(trash, ignore_errors=True)
    if exists(folder):
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def publish_folder(scratch: Path, folder: Path) -> None:
    """Give a folder that is complete its name, on the disk itself. Where that fails it has its old
    name: the same command, given again, does not find something that it has not finished.
    """
    scratch.rename(folder)
    try:
        fsync_path(folder.parent)
    except OSError:
        folder.rename(scratch)
        raise


def fsync_path(path: Path) -> None:
    """Make the disk itself hold a file or folder, not only the system's memory."""
    with add_filename_to_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _fsync_descriptor(descriptor)
        finally:
            close_ignoring_errors(descriptor)


def close_ignoring_errors(descriptor: int) -> None:
    """Close a file or folder that was not written through it: an error of that loses nothing."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _fsync_descriptor(descriptor: int) -> None:
    if sys.platform == "darwin":
        # On macOS fsync leaves data in the drive's own cache; this does not. Volumes that have
        # no such thing, such as a server's by SMB, refuse it.
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, many of them on a network, cannot sync folders.
        unsupported = error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)
        if not (unsupported and stat.S_ISDIR(os.fstat(descriptor).st_mode)):
            raise


@contextlib.contextmanager
def file_lock(path: Path, activity: str) -> Iterator[None]:
    """Lock a folder for this process. The system releases the lock when the process ends, however
    it ends.

    Args:
        path: the folder, which need not exist; the lock file is next to it.
        activity: what another process would be doing, such as "training".

    Raises:
        UserError: if another process works on it, or nothing can be written there.
        OSError: if it cannot be locked.
    """
    lock = path.with_name(f".{path.name}.lock")
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o666)
        except OSError as error:
            raise to_user_error(error, "write", lock, "choose another folder.") from error
        try:
            with add_filename_to_errors(lock):
                if not _try_lock(descriptor):
                    raise UserError(
                        f"another process is already {activity} {path}",
                        "wait until it finishes, or choose another name.",
                    )
                if not is_same_file(descriptor, lock):
                    continue  # the process that had it deleted it meanwhile: it locks nobody out
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # what locks is the open file, not its name
                    lock.unlink()
            return
        finally:
            close_ignoring_errors(descriptor)


# Answers of file systems that have no locks.
LOCKS_UNSUPPORTED_ERRNOS = (
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EINVAL,
)


def _try_lock(descriptor: int) -> bool:
    """Lock an open file; whether no other process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in LOCKS_UNSUPPORTED_ERRNOS:
            raise
    return True


def is_same_file(descriptor: int, path: Path) -> bool:
    """Whether an open file or folder is the one of that name. While it is open, its inode is not
    given to another one.
    """
    try:
        with add_filename_to_errors(path):
            return os.path.samestat(os.fstat(descriptor), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def reject_symlinks(folder: Path) -> None:
    """Refuse a folder with anything in it but files and folders: a link may lead out of it, and
    reading a pipe may take for ever.

    Raises:
        UserError: naming what else is there.
        OSError: if a folder cannot be read.
    """
    # Does not follow links, and names them.
    for parent, folders, names in os.walk(folder, onerror=_raise_unless_missing):
        for name in (*folders, *names):
            path = Path(parent, name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # another process is working here
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise UserError(
                    f"{path} is a symbolic link or not a regular file",
                    "replace it with a copy of the file: the folder must not contain links.",
                )


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # another process may work here
        raise error


def expand_user(name: str) -> Path:
    """The path of a name that may begin with `~`; as it is where there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


MAX_SMALL_FILE_BYTES = 1 << 20  # bytes of a file that describes something


def read_small(path: Path, max_bytes: int = MAX_SMALL_FILE_BYTES) -> str:
    """The text of a file that has to be small.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is larger than `max_bytes` bytes, or not UTF-8.
    """
    return read_small_bytes(path, max_bytes).decode("utf-8")


def read_small_bytes(path: Path, max_bytes: int = MAX_SMALL_FILE_BYTES) -> bytes:
    """The content of a file that has to be small.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is larger than `max_bytes` bytes.
    """
    with add_filename_to_errors(path), path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes:,} bytes")
    return content


def read_json(path: Path, max_bytes: int = MAX_SMALL_FILE_BYTES) -> Any:
    """The values in a small JSON file, which may begin with a byte-order mark.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is larger than `max_bytes` bytes, or not JSON.
    """
    return parse_json(read_small(path, max_bytes).removeprefix("\ufeff"))


def replace_nonfinite(tree: Any) -> Any:
    """A tree of values with None in the place of numbers that JSON does not have."""
    if isinstance(tree, dict):
        return {name: replace_nonfinite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [replace_nonfinite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def parse_json(text: str) -> Any:
    """As `json.loads`, which answers to some texts with another error than ValueError."""
    with recursion_error_as_value_error():
        return json.loads(text)


@contextlib.contextmanager
def recursion_error_as_value_error() -> Iterator[None]:
    """Where a text is parsed: nesting beyond what Python bears is a ValueError like others."""
    try:
        yield
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with add_filename_to_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


CHECKSUM_KEY = "seal"  # stored in every checksummed file


def dump_checksummed(tree: Mapping[str, Any]) -> str:
    """A JSON object as text, with the hash of everything in it as its `seal`."""
    return json.dumps({**tree, CHECKSUM_KEY: _checksum(tree)}, indent=1) + "\n"


def read_checksummed(path: Path, max_format: int) -> dict[str, Any]:
    """Read what `dump_checksummed` made, without the checksum. Every changed byte is found, also
    where it changes nothing: the file has to be what `dump_checksummed` writes.

    Args:
        max_format: the newest `format` that is understood.

    Raises:
        UserError: if a newer mlxgpt wrote it.
        OSError: if it cannot be read.
        ValueError: if it is not what was written.
    """
    text = read_small(path)
    tree = parse_json(text)
    if not isinstance(tree, dict):
        raise ValueError("it is not a JSON object")
    file_format = tree.get("format")
    if isinstance(file_format, int) and file_format > max_format:
        raise UserError(
            f"{path.parent} was written by a newer mlxgpt (format {file_format})",
            "update mlxgpt (git pull in its checkout), or use the version that wrote it.",
        )
    tree.pop(CHECKSUM_KEY, None)
    with recursion_error_as_value_error():
        if dump_checksummed(tree) != text:
            raise ValueError("it was modified (checksum mismatch)")
    return tree


def _checksum(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
