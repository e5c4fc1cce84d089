"""Memory limits, read from simulated Linux /proc and /sys folders, with and without containers."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxgpt.backend import device, memory_limits
from mlxgpt.backend.memory_limits import MemoryLimit
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these")

MB = 1 << 20
STATUS = "Name:\tpython\nVmSize:\t  300000 kB\nVmRSS:\t   60000 kB\nRssAnon:\t   51200 kB\n"
UNLIMITED_V1 = 9223372036854771712


def write_line(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


class System:
    """A root folder with proc/ and sys/."""

    def __init__(self, root: Path, cgroup: str) -> None:
        self.root = root
        write_line(root / "proc/self/status", STATUS)
        write_line(root / "proc/self/cgroup", cgroup)

    def add_cgroup_v2(self, folder: str, limit: object, current: int, inactive: int = 0) -> Path:
        path = self.root / "sys/fs/cgroup" / folder
        write_line(path / "memory.max", limit)
        write_line(path / "memory.high", "max")
        write_line(path / "memory.current", current)
        write_line(path / "memory.stat", f"anon 1\nfile 2\ninactive_file {inactive}\nactive_file 5")
        return path

    def add_cgroup_v1(self, folder: str, limit: int, usage: int, inactive: int = 0) -> Path:
        path = self.root / "sys/fs/cgroup/memory" / folder
        write_line(path / "memory.limit_in_bytes", limit)
        write_line(path / "memory.usage_in_bytes", usage)
        write_line(path / "memory.stat", f"inactive_file 7\ntotal_inactive_file {inactive}")
        return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: unlimited)
    return tmp_path


def limits_in_mb(root: Path) -> list[tuple[int, int]]:
    """Return total and free MiB of each limit; 50 MiB of the free memory is this process's data."""
    return [(limit.total // MB, limit.free // MB) for limit in memory_limits.memory_limits(root)]


def test_cgroup_v2_container_is_the_root_cgroup(root: Path) -> None:
    System(root, "0::/").add_cgroup_v2("", 400 * MB, 300 * MB, 100 * MB)
    assert limits_in_mb(root) == [(400, 250)]


def test_limits_of_parent_cgroups_apply(root: Path) -> None:
    """As under systemd, where sessions are in slices; the real root has no limit file."""
    system = System(root, "0::/user.slice/user-1000.slice/session-3.scope")
    system.add_cgroup_v2("user.slice/user-1000.slice/session-3.scope", "max", 100 * MB)
    system.add_cgroup_v2("user.slice/user-1000.slice", 900 * MB, 500 * MB)
    system.add_cgroup_v2("user.slice", 2000 * MB, 1800 * MB)
    assert limits_in_mb(root) == [(900, 450), (2000, 250)]


def test_memory_high_counts_as_a_limit(root: Path) -> None:
    path = System(root, "0::/").add_cgroup_v2("", 400 * MB, 100 * MB)
    write_line(path / "memory.high", 300 * MB)
    assert limits_in_mb(root) == [(300, 250)]
    write_line(path / "memory.high", 10 * MB)
    assert limits_in_mb(root) == [(10, 0)]


def test_cgroup_v1_container_sees_the_host_path(root: Path) -> None:
    system = System(root, "11:cpu,cpuacct:/docker/ab12\n4:memory:/docker/ab12\n0::/docker/ab12")
    system.add_cgroup_v1("", 400 * MB, 300 * MB, 100 * MB)
    assert limits_in_mb(root) == [(400, 250)]


def test_cgroup_v1_next_to_an_empty_v2(root: Path) -> None:
    system = System(root, "9:name=systemd:/\n4:memory:/jobs/7\n0::/")
    (root / "sys/fs/cgroup/unified").mkdir(parents=True)
    system.add_cgroup_v1("", UNLIMITED_V1, 9000 * MB)
    system.add_cgroup_v1("jobs", 600 * MB, 100 * MB)
    system.add_cgroup_v1("jobs/7", UNLIMITED_V1, 50 * MB)
    assert limits_in_mb(root) == [(600, 550)]


def test_cgroup_outside_the_container(root: Path) -> None:
    System(root, "0::/../elsewhere").add_cgroup_v2("", 400 * MB, 100 * MB)
    assert limits_in_mb(root) == [(400, 350)]


@pytest.mark.parametrize("cgroup", ["", "0::/", "0::/none", "4:memory:/none", "garbage"])
def test_unreadable_cgroup_means_no_limit(root: Path, cgroup: str) -> None:
    System(root, cgroup)
    (root / "sys/fs/cgroup").mkdir(parents=True)
    assert limits_in_mb(root) == []


def test_system_without_proc_has_no_limit(root: Path) -> None:
    assert memory_limits.memory_limits(root) == []


def test_address_space_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = 4000 * MB
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (total, resource.RLIM_INFINITY))
    (limit,) = memory_limits.memory_limits(root)
    assert limit.total == total
    assert limit.free == total - limit.required + memory_limits.MIN_RESIDENT
    write_line(root / "proc/self/status", STATUS.replace("300000", "3000000"))
    (limit,) = memory_limits.memory_limits(root)
    assert limit.free == total - (3_000_000 - 60_000) * 1024, "a process that already has much"


def test_fewer_threads_require_less_address_space(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (4000 * MB, 4000 * MB))
    required = []
    for threads in ("1", "none", "9999"):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
        required.append(memory_limits.memory_limits(root)[0].required)
    assert required[0] <= required[1] == required[2]
    assert required[0] == memory_limits.MIN_ADDRESS_SPACE + memory_limits.ADDRESS_SPACE_PER_THREAD


def test_real_address_space_limit() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "from mlxgpt.backend import memory_limits, device\n"
        "limit = memory_limits.memory_limits()[0]\n"
        "assert limit.total == 8 << 30 and 6 << 30 < limit.free < 8 << 30, limit\n"
        "assert device.total_memory_bytes() <= 8 << 30\n"
        "assert device.free_memory_bytes() <= limit.free\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def set_memory_limit(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    limit = MemoryLimit(
        "this container's memory", total, free, memory_limits.MIN_RESIDENT, "give it more."
    )
    monkeypatch.setattr(memory_limits, "memory_limits", lambda: [limit])


def test_device_memory_is_capped_by_the_smallest_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "device_type", lambda: "cpu")
    set_memory_limit(monkeypatch, 400 * MB, 300 * MB)
    assert (device.total_memory_bytes(), device.free_memory_bytes()) == (400 * MB, 300 * MB)
    monkeypatch.setattr(device, "device_type", lambda: "cuda")
    assert device.total_memory_bytes() != 400 * MB, "a GPU has its own"


def test_too_little_memory_to_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_memory_limit(monkeypatch, 100 * MB, 90 * MB)
    with pytest.raises(UserError, match=r"limited to 105 MB, but mlxgpt needs 134 MB to start"):
        memory_limits.check_memory_limits()
    set_memory_limit(monkeypatch, 400 * MB, 90 * MB)
    memory_limits.check_memory_limits()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[metal::malloc] Unable to allocate 99 bytes"),
        RuntimeError("Resource temporarily unavailable"),
        RuntimeError("can't start new thread"),
        ImportError("libmlx.so: failed to map segment from shared object"),
    ],
    ids=str,
)
def test_out_of_memory_errors_are_explained(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_limits, "memory_limits", list)
    explained = memory_limits.explain_out_of_memory(error)
    assert explained is not None
    assert explained.problem == "out of memory"
    set_memory_limit(monkeypatch, 400 * MB, 1)
    explained = memory_limits.explain_out_of_memory(error)
    assert explained is not None
    assert "this container's memory is limited to 419 MB" in explained.problem
    assert explained.remedy.endswith("or give it more.")


@pytest.mark.parametrize("make", [RuntimeError, ImportError, OSError])
def test_other_errors_are_not_explained(make: Callable[[str], Exception]) -> None:
    assert memory_limits.explain_out_of_memory(make("something else")) is None
