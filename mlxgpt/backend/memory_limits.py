"""Limits on this process's memory: on its address space (`ulimit -v`), and by containers (cgroups).

Standard library only, since it is asked before anything large is loaded.
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

# What the libraries take before a model has any: of address space, also by each thread of OpenBLAS,
# numpy's and ours; and resident. Measured on Linux with numpy 2.5 and mlx 0.32.
ADDRESSES, ADDRESSES_PER_THREAD, RESIDENT = 360 << 20, 80 << 20, 128 << 20

# How a limit, usage and reclaimable file cache are named, in cgroup v2 and v1.
_Names = tuple[tuple[str, ...], str, str]
V2: _Names = (("memory.max", "memory.high"), "memory.current", "inactive_file")
V1: _Names = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")

# What the system, C++, numpy, MLX and Python say where memory or threads run out.
EXHAUSTED = (
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


@dataclass(frozen=True)
class Limit:
    """A limit on memory.

    Attributes:
        name: what is limited.
        total: bytes.
        free: bytes that this process may have resident, what it has already included.
        least: bytes that mlxgpt takes before a model has any.
        remedy: how it is raised.
    """

    name: str
    total: int
    free: int
    least: int
    remedy: str


def limits(root: Path = Path("/")) -> list[Limit]:
    """All limits on this process; none where the system is not Linux.

    Args:
        root: where proc/ and sys/ are.
    """
    return [*_of_address_space(root), *_of_cgroups(root)] if sys.platform == "linux" else []


def address_space() -> int | None:
    """The most addresses that this process may have, in bytes; None without a limit."""
    total, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if total == resource.RLIM_INFINITY else total


def refuse_too_little() -> None:
    """Refuse to start where loading the libraries would fail.

    Raises:
        UserError: naming the limit.
    """
    for limit in limits():
        if limit.total < limit.least:
            raise UserError(
                f"{limit.name} is limited to {_megabytes(limit.total)}, and mlxgpt needs "
                f"{_megabytes(limit.least)} to start",
                limit.remedy,
            )


def exhausted(error: BaseException) -> UserError | None:
    """What to tell the user, if an error means that memory ran out; else None."""
    text = str(error).lower()
    ran_out = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not ran_out and not any(words in text for words in EXHAUSTED):
        return None
    return _out_of_memory("out of memory")


def crash(end: str) -> UserError:
    """The error of a process that was ended: by a signal, or a library with a code of its own."""
    return _out_of_memory(f"the process ended with {end}, as it does without memory")


def _out_of_memory(problem: str) -> UserError:
    remedy = "use a smaller --batch-size or model"
    if smallest := min(limits(), key=lambda limit: limit.free, default=None):
        problem = f"{problem}: {smallest.name} is limited to {_megabytes(smallest.total)}"
        return UserError(problem, f"{remedy}, or {smallest.remedy}")
    return UserError(problem, f"close other programs, or {remedy}.")


def _of_address_space(root: Path) -> Iterator[Limit]:
    assert sys.platform == "linux"
    if (total := address_space()) is None:
        return
    threads = len(os.sched_getaffinity(0))
    if (fewer := os.environ.get("OPENBLAS_NUM_THREADS", "")).isdecimal():
        threads = min(threads, int(fewer))
    least = ADDRESSES + ADDRESSES_PER_THREAD * threads
    status = _fields(root / "proc/self/status")
    not_resident = max(least - RESIDENT, status.get("VmSize:", 0) - status.get("VmRSS:", 0))
    remedy = "raise its limit: ulimit -v unlimited"
    yield Limit("the address space", total, total - not_resident, least, remedy)


def _of_cgroups(root: Path) -> Iterator[Limit]:
    """Those of the cgroup that this process is in, and of all around it."""
    own = _fields(root / "proc/self/status").get("RssAnon:", 0)
    for folder, (names, usage, cache) in _cgroups(root):
        totals = [value for name in names if (value := _number(folder / name)) is not None]
        used = _number(folder / usage)
        if used is None or not totals or min(totals) >= 1 << 60:  # as v1 says that there is none
            continue
        used = max(0, used - _fields(folder / "memory.stat", unit=1).get(cache, 0))
        free = max(0, min(totals) - used + own)
        remedy = "give the container more memory."
        yield Limit("this container's memory", min(totals), free, RESIDENT, remedy)


def _cgroups(root: Path) -> Iterator[tuple[Path, _Names]]:
    """Folders of this process's memory cgroups, from the inside out, with the names in them."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":  # v2, alone or next to v1
                mount, names = root / "sys/fs/cgroup", V2
            elif "memory" in controllers.split(","):
                mount, names = root / "sys/fs/cgroup/memory", V1
            else:
                continue
            # A container sees its own cgroup as the mount itself, and with v1 the path outside.
            inner = mount.joinpath(*(part for part in path.split("/") if part != ".."))
            while inner != mount.parent:
                yield inner, names
                inner = inner.parent


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, such as `max`."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _fields(path: Path, unit: int = 1024) -> dict[str, int]:
    """The numbers in a file of names and values, in bytes; none if it cannot be read."""
    with contextlib.suppress(OSError):
        rows = [line.split() for line in path.read_text().splitlines()]
        return {row[0]: unit * int(row[1]) for row in rows if row[1:] and row[1].isdecimal()}
    return {}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
