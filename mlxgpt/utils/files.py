"""File utilities: atomic writes, checksums, locks, reads with a size limit, and path checks that
raise an error if a path cannot be read.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import fnmatch
import functools
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlxgpt.utils.errors import UserError

_FREE_SPACE = "free some space, and run the same command again."
_CHECK_DISK = "check the disk and its connection, and run the same command again."
_CHECK_PERMISSIONS = "check the permissions of the file and its folder."
_RAISE_LIMIT = "close other programs, or raise the limit on open files: ulimit -n 4096"
# errno -> remedy; a failing network folder may return any of several errors.
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
    """Whether a path exists; a broken link does not count.

    Raises:
        OSError: if that cannot be determined. `Path.exists`, `is_file` and `is_dir` return False
            instead from Python 3.14 on, so that an unreadable run would look like a new one.
    """
    return _mode(path) is not None


def is_file(path: Path) -> bool:
    """Whether a path is a regular file or a link to one; raises like `exists`."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder or a link to one; raises like `exists`."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def lexists(path: Path) -> bool:
    """Whether a path exists, including broken links; raises like `exists`."""
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
    """List the entries of a folder that match a shell pattern, sorted; [] if it does not exist.

    Raises:
        OSError: if it cannot be read; `Path.glob` and `glob.glob` return nothing instead.
    """
    try:
        return sorted(p for p in folder.iterdir() if fnmatch.fnmatchcase(p.name, pattern))
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextlib.contextmanager
def add_filename_to_errors(path: Path) -> Iterator[None]:
    """Add the file name to an OSError without one, as raised by reads, writes and fsync."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def to_user_error(error: OSError, action: str, path: Path, remedy: str = "") -> UserError:
    """Convert the OSError of a failed file operation to a UserError with a remedy.

    Args:
        action: a verb, such as "read" or "write".
        path: used if the error contains no file name.
        remedy: for errors that are not in REMEDIES, such as a missing file.
    """
    problem = f"cannot {action} {error.filename or path}: {error.strerror or error}"
    return UserError(problem, find_remedy(error, remedy))


def find_remedy(error: Exception, default: str = "") -> str:
    """Remedy for an error by its errno; `default` if there is none."""
    error_number = getattr(error, "errno", None) or 0
    return REMEDIES.get(error_number, default or "check the file and its folder.")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file atomically: readers, and a crash, see the old or the new file."""
    scratch = path.with_name(f".{path.name}.new")
    if isinstance(content, str):
        # Escapes surrogates, which come from file names that are not UTF-8.
        content = content.encode("utf-8", errors="backslashreplace")
    try:
        scratch.write_bytes(content)
        fsync_path(scratch)
        scratch.replace(path)
        fsync_path(path.parent)
    except OSError as error:
        error.filename = str(path)  # not the scratch file's name
        raise
    finally:
        with contextlib.suppress(OSError):  # usually renamed by now
            scratch.unlink()


def iter_cache_folders() -> Iterator[Path]:
    """Yield cache folders that only this user can write to: the user's cache folder for mlxgpt,
    then, as a fallback, a temporary folder that is deleted when the process exits.
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


TRASH_SUFFIX = ".gone"  # of folders that are being deleted


def remove_folder(folder: Path) -> None:
    """Delete a folder if it exists. It is renamed first, so that an interruption leaves it complete
    or gone. Also deletes what an earlier interruption left.
    """
    trash = folder.with_name(f".{folder.name}{TRASH_SUFFIX}")
    shutil.rmtree(trash, ignore_errors=True)
    if exists(folder):
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def publish_folder(scratch: Path, folder: Path) -> None:
    """Rename a complete folder to its final name, and sync that to disk. If syncing fails, the
    rename is undone, so that running the command again does not find an unfinished result.
    """
    scratch.rename(folder)
    try:
        fsync_path(folder.parent)
    except OSError:
        folder.rename(scratch)
        raise


def fsync_path(path: Path) -> None:
    """Sync a file or folder to disk."""
    with add_filename_to_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _fsync_descriptor(descriptor)
        finally:
            close_ignoring_errors(descriptor)


def close_ignoring_errors(descriptor: int) -> None:
    """Close a descriptor that was not used for writing, so that errors can be ignored."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _fsync_descriptor(descriptor: int) -> None:
    if sys.platform == "darwin":
        # On macOS, fsync leaves data in the drive's cache, F_FULLFSYNC does not. Some volumes,
        # such as SMB shares, do not support it.
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, mostly network file systems, cannot sync folders.
        unsupported = error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)
        if not (unsupported and stat.S_ISDIR(os.fstat(descriptor).st_mode)):
            raise


@contextlib.contextmanager
def file_lock(path: Path, activity: str) -> Iterator[None]:
    """Lock a folder for this process. The system releases the lock when the process ends, even if
    it is killed.

    Args:
        path: the folder, which need not exist; the lock file is next to it.
        activity: for the error message: what another process is doing, such as "training".

    Raises:
        UserError: if another process holds the lock, or the lock file cannot be written.
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
                    continue  # deleted by its previous holder meanwhile: locks nothing
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # the lock is on the open file, not its name
                    lock.unlink()
            return
        finally:
            close_ignoring_errors(descriptor)


# Errors of file systems without locks.
LOCKS_UNSUPPORTED_ERRNOS = (
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EINVAL,
)


def _try_lock(descriptor: int) -> bool:
    """Lock an open file; returns False if another process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in LOCKS_UNSUPPORTED_ERRNOS:
            raise
    return True


def is_same_file(descriptor: int, path: Path) -> bool:
    """Whether an open descriptor is the file or folder at `path`. Its inode cannot be reused while
    it is open.
    """
    try:
        with add_filename_to_errors(path):
            return os.path.samestat(os.fstat(descriptor), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def reject_symlinks(folder: Path) -> None:
    """Reject a folder that contains anything but files and folders: a link may lead out of it, and
    reading a pipe may block forever.

    Raises:
        UserError: with the path of such an entry.
        OSError: if a folder cannot be read.
    """
    # os.walk lists links, but does not follow them.
    for parent, folders, names in os.walk(folder, onerror=_raise_unless_missing):
        for name in (*folders, *names):
            path = Path(parent, name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # deleted by another process
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise UserError(
                    f"{path} is a symbolic link or not a regular file",
                    "replace it with a copy of the file: the folder must not contain links.",
                )


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # deleted by another process
        raise error


def expand_user(name: str) -> Path:
    """Path of a name, with a leading `~` expanded; unchanged if there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


MAX_SMALL_FILE_BYTES = 1 << 20  # 1 MiB, for metadata and config files


def read_small(path: Path, max_bytes: int = MAX_SMALL_FILE_BYTES) -> str:
    """Read a small UTF-8 text file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is larger than `max_bytes` bytes, or not UTF-8.
    """
    return read_small_bytes(path, max_bytes).decode("utf-8")


def read_small_bytes(path: Path, max_bytes: int = MAX_SMALL_FILE_BYTES) -> bytes:
    """Read a small file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is larger than `max_bytes` bytes.
    """
    with add_filename_to_errors(path), path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes:,} bytes")
    return content


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with add_filename_to_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
