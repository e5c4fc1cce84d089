"""Limits on this process's memory: address space (`ulimit -v`) and containers (cgroups).

Standard library only, since it is imported before any large library.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxgpt.utils.errors import UserError

MIN_RESIDENT = 128 << 20  # bytes of the libraries, measured on Linux with numpy 2.5, mlx 0.32


@dataclass(frozen=True)
class MemoryLimit:
    """A memory limit.

    Attributes:
        name: what is limited.
        total: bytes.
        free: bytes that this process may have resident, including those that it already has.
        required: bytes that mlxgpt needs without a model.
        remedy: how to raise the limit.
    """

    name: str
    total: int
    free: int
    required: int
    remedy: str


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """All memory limits on this process; empty on systems other than Linux.

    Args:
        root: folder that contains proc/ and sys/.
    """
    return [*_address_space_limits(root), *_cgroup_limits(root)] if sys.platform == "linux" else []


def address_space_limit() -> int | None:
    """Limit on this process's address space in bytes; None if unlimited."""
    total, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if total == resource.RLIM_INFINITY else total


def check_memory_limits() -> None:
    """Check that the limits leave enough memory to load the libraries.

    Raises:
        UserError: for a limit that is too low.
    """
    for limit in memory_limits():
        if limit.total < limit.required:
            raise UserError(
                f"{limit.name} is limited to {_format_megabytes(limit.total)}, but mlxgpt needs "
                f"{_format_megabytes(limit.required)} to start",
                limit.remedy,
            )


# Messages of the system, C++, numpy, MLX and Python when memory or threads run out.
OUT_OF_MEMORY_MESSAGES = (
    "std::bad_alloc",
    "unable to allocate",
    "attempting to allocate",
    "insufficient memory",
    "out of memory",
    "cannot allocate memory",
    "failed to map segment",
    "resource temporarily unavailable",
    "can't start new thread",
)


def explain_out_of_memory(error: BaseException) -> UserError | None:
    """Two-line error for the user if an exception means that memory ran out; else None."""
    text = str(error).lower()
    ran_out = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not ran_out and not any(words in text for words in OUT_OF_MEMORY_MESSAGES):
        return None
    return _out_of_memory_error("out of memory")


def crash_error(exit_reason: str) -> UserError:
    """Error for a process that was killed by a signal or exited by a library."""
    return _out_of_memory_error(f"the process ended with {exit_reason}, probably out of memory")


def _out_of_memory_error(problem: str) -> UserError:
    remedy = "use a smaller --batch-size or model"
    if smallest := min(memory_limits(), key=lambda limit: limit.free, default=None):
        problem = f"{problem}: {smallest.name} is limited to {_format_megabytes(smallest.total)}"
        return UserError(problem, f"{remedy}, or {smallest.remedy}")
    return UserError(problem, f"close other programs, or {remedy}.")


# Bytes that the libraries reserve, and more for each BLAS thread; measured like MIN_RESIDENT.
MIN_ADDRESS_SPACE, ADDRESS_SPACE_PER_THREAD = 360 << 20, 80 << 20


def _address_space_limits(root: Path) -> Iterator[MemoryLimit]:
    assert sys.platform == "linux"
    if (total := address_space_limit()) is None:
        return
    threads = len(os.sched_getaffinity(0))
    if (blas_threads := os.environ.get("OPENBLAS_NUM_THREADS", "")).isdecimal():
        threads = min(threads, int(blas_threads))
    required = MIN_ADDRESS_SPACE + ADDRESS_SPACE_PER_THREAD * threads
    status = read_fields(root / "proc/self/status")
    not_resident = max(required - MIN_RESIDENT, status.get("VmSize:", 0) - status.get("VmRSS:", 0))
    remedy = "raise the limit: ulimit -v unlimited"
    yield MemoryLimit("the address space", total, total - not_resident, required, remedy)


def _cgroup_limits(root: Path) -> Iterator[MemoryLimit]:
    """Memory limits of this process's cgroup and all its parents."""
    own_bytes = read_fields(root / "proc/self/status").get("RssAnon:", 0)
    for folder, (names, usage, cache) in _list_cgroups(root):
        totals = [value for name in names if (value := _read_number(folder / name)) is not None]
        used = _read_number(folder / usage)
        if used is None or not totals or min(totals) >= 1 << 60:  # v1's value for no limit
            continue
        used = max(0, used - read_fields(folder / "memory.stat", unit=1).get(cache, 0))
        free = max(0, min(totals) - used + own_bytes)
        remedy = "give the container more memory."
        yield MemoryLimit("this container's memory", min(totals), free, MIN_RESIDENT, remedy)


# Files of limits and usage, and memory.stat's field of reclaimable cache, in cgroup v2 and v1.
_CgroupFiles = tuple[tuple[str, ...], str, str]
CGROUP_V2: _CgroupFiles = (("memory.max", "memory.high"), "memory.current", "inactive_file")
CGROUP_V1: _CgroupFiles = (
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
)


def _list_cgroups(root: Path) -> Iterator[tuple[Path, _CgroupFiles]]:
    """Folders of this process's memory cgroups, innermost first, with their file names."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            hierarchy, controllers, path = line.split(":", 2)
            if hierarchy == "0":  # v2, alone or next to v1
                mount, names = root / "sys/fs/cgroup", CGROUP_V2
            elif "memory" in controllers.split(","):
                mount, names = root / "sys/fs/cgroup/memory", CGROUP_V1
            else:
                continue
            # In a container, the mount itself is its cgroup, and v1 lists the path on the host.
            cgroup = mount.joinpath(*(part for part in path.split("/") if part != ".."))
            while cgroup != mount.parent:
                yield cgroup, names
                cgroup = cgroup.parent


def read_fields(path: Path, unit: int = 1024) -> dict[str, int]:
    """Parse a file of "name value" lines, in bytes; empty if it cannot be read."""
    with contextlib.suppress(OSError):
        rows = [line.split() for line in path.read_text().splitlines()]
        return {row[0]: unit * int(row[1]) for row in rows if row[1:] and row[1].isdecimal()}
    return {}


def _read_number(path: Path) -> int | None:
    """The number in a file; None if it contains something else, such as `max`."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _format_megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
