"""Groups of several processes: communication, errors and lost ranks. The contract that they share
with the local group is tested in test_group_contract.py.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from mlxgpt.distributed.control import ControlChannel
from mlxgpt.distributed.group import LOCAL_GROUP, MLXGroup, init_process_group
from tests.helpers.rank_processes import RankProcesses, RankResults

JOIN_GROUP_CODE = """
import logging, os, sys, time
import mlx.core as mx
from mlxgpt.distributed.group import init_process_group
from mlxgpt.utils.errors import UserError
with init_process_group() as group:
    group.barrier("start")
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLX_HOSTFILE", "MLX_JACCL_COORDINATOR", "NCCL_HOST_IP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


class RecordingGroup(MLXGroup):
    """A single rank on `mx.distributed` that records its sums, and whether the watchdog was on."""

    def __init__(self) -> None:
        self.channel = ControlChannel(0, 1, {})
        super().__init__(mx.distributed.init(), self.channel, ["here"])
        self.summed_arrays: list[tuple[str, mx.array]] = []
        self.watched_flags: list[bool] = []

    def sum(self, name: str, array: mx.array) -> mx.array:
        self.summed_arrays.append((name, array))
        self.watched_flags.append(self.channel.step_seconds is not None)
        return super().sum(name, array)


@pytest.fixture
def recording_group() -> Iterator[RecordingGroup]:
    group = RecordingGroup()
    yield group
    group.close()


def run_on_ranks(code: str, size: int = 2) -> RankResults:
    """Start `size` ranks that join a group and run `code`; return their results."""
    indented = "".join(f"    {line}\n" for line in code.splitlines())
    with RankProcesses(command=["-c", JOIN_GROUP_CODE + indented], size=size) as ranks:
        return ranks.wait()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_gradients_are_packed_into_one_array_and_the_loss_is_summed_in_float32(
    recording_group: RecordingGroup, dtype: mx.Dtype
) -> None:
    gradients = {"a": mx.full((2, 3), 1 / 3), "b": mx.array([-2.0])}
    loss, means = recording_group.average(mx.array(1 / 7), gradients, dtype)
    (name, packed), (second_name, stop_and_loss) = recording_group.summed_arrays
    assert (name, second_name) == ("gradients", "loss")
    assert (packed.dtype, packed.shape) == (dtype, (7,))
    assert stop_and_loss.dtype == mx.float32
    assert mx.array_equal(loss, mx.array(1 / 7))
    for key, gradient in gradients.items():
        assert mx.array_equal(means[key], gradient.astype(dtype).astype(mx.float32))


def test_all_reduces_are_named_by_array_size_and_dtype(recording_group: RecordingGroup) -> None:
    recording_group.sum("loss", mx.zeros((2, 3), mx.bfloat16))
    position = recording_group.channel.position
    assert position.name == "all-reduce loss of 6 mlx.core.bfloat16"
    assert (position.number, position.all_reduces_started, position.all_reduces_finished) == (
        1,
        1,
        1,
    )


def test_the_watchdog_covers_steps_but_not_array_broadcasts(
    recording_group: RecordingGroup,
) -> None:
    def record_watched_flags() -> list[bool]:
        recording_group.watched_flags.clear()
        recording_group.sum("loss", mx.ones(1))
        recording_group.broadcast_arrays(
            "weights", {"w": mx.ones(1)}
        )  # may take far longer than a step
        recording_group.sum("loss", mx.ones(1))
        return list(recording_group.watched_flags)

    assert record_watched_flags() == [False] * 3
    with recording_group.watchdog(3.0):
        assert recording_group.channel.step_seconds == 3.0
        assert record_watched_flags() == [True, False, True]
    assert record_watched_flags() == [False] * 3


def test_a_single_process_joins_the_local_group(notes: list[str]) -> None:
    with init_process_group() as group:
        assert group is LOCAL_GROUP
    assert notes == []


def test_the_group_is_announced_by_the_main_rank() -> None:
    code = "import logging; logging.basicConfig(level=logging.INFO)" + JOIN_GROUP_CODE + "    pass"
    with RankProcesses(command=["-c", code], size=2) as ranks:
        results = ranks.wait()
    assert results.codes == [0, 0]
    host = socket.gethostname()
    assert f"2 ranks, on {host}, {host}: MLX traffic is not authenticated" in results.errors[0]
    assert results.errors[1] == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_all_ranks(rank: int) -> None:
    code = (
        f"if group.rank == {rank}:\n    raise UserError('no memory', 'buy some.')\n"
        "group.gather('never', 1)"
    )
    results = run_on_ranks(code)
    if rank:
        assert results.codes[0] == 2
        assert "mlxgpt: rank 1 of 2 (on " in results.errors[0]
        assert ": no memory\n  → buy some.\n" in results.errors[0]
    else:  # the caller prints it
        assert results.codes == [1, 2]
        assert "UserError: no memory\nbuy some." in results.errors[0]
        assert results.errors[1] == ""


def test_a_rank_that_finishes_early_ends_all_ranks() -> None:
    results = run_on_ranks("if group.rank: group.gather('only here', 1)")
    assert results.codes == [1, 1]
    assert "rank 0 of 2" in results.errors[0]
    assert "in barrier end (number 3), " in results.errors[0]
    assert "in gather only here (number 3)" in results.errors[0]


@pytest.mark.parametrize(
    ("main", "other"),
    [
        ("group.gather('a', 1)", "group.broadcast('b')"),
        ("group.broadcast('b', 1)", "group.sum('c', mx.ones(100_000))"),
        ("group.sum('c', mx.ones(100_000))", "group.gather('a', 1)"),
        ("group.sum('c', mx.ones(100_000))", "group.sum('c', mx.ones(200_000))"),
        ("group.sum('c', mx.ones(200_000))", "group.sum('c', mx.ones(100_000))"),
        ("group.sum('c', mx.ones(100_000))", "group.sum('d', mx.ones(100_000))"),
    ],
)
def test_different_collectives_are_reported_on_real_ranks(main: str, other: str) -> None:
    """Including sums that MLX would add up. test_control.py has all pairs."""
    results = run_on_ranks(f"if group.is_main:\n    {main}\nelse:\n    {other}\n"
                "group.barrier('after')")  # fmt: skip
    assert results.codes == [1, 1]
    assert "mlxgpt: the ranks are in different collectives: rank 0 of 2 " in results.errors[0]
    assert results.errors[0].count("(number 3)") == 2


def test_a_lost_rank_is_reported_while_a_log_handlers_lock_is_held() -> None:
    """The lock stays held when the main thread blocks in an all-reduce while logging."""
    results = run_on_ranks(
        "if group.rank: time.sleep(1); os._exit(9)\n"
        "handler = logging.StreamHandler()\n"
        "logging.getLogger().addHandler(handler)\n"
        "handler.acquire()\n"
        "group.sum('loss', mx.ones(1))"
    )
    assert results.codes == [1, 9]
    host = socket.gethostname()
    problem = f"mlxgpt: lost rank 1 of 2 (on {host}): its connection was closed\n"
    remedy = "  → the same command resumes: mlx.launch -n 2 -- python -c "
    assert problem + remedy in results.errors[0]


def test_a_lost_rank_that_mlx_notices_first_is_reported() -> None:
    """MLX's ring raises this since ml-explore/mlx#4060; other backends wait forever."""
    results = run_on_ranks(
        "if group.rank: time.sleep(1); os._exit(9)\n"
        "with group._control.all_reduce('loss'):\n"
        "    raise RuntimeError('[ring] connection to a peer was lost')"
    )
    assert results.codes == [1, 9]
    assert "mlxgpt: lost rank 1 of 2" in results.errors[0]
    assert "Traceback" not in results.errors[0]
