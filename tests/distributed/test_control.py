"""Control channels over the loopback interface: messages, and failures that end all ranks."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from mlxgpt.distributed import control, rendezvous
from mlxgpt.distributed.control import ControlChannel, Position

HOSTNAME = socket.gethostname()


class ExitRecorder:
    """Records the exit codes of ranks and what they wrote to stderr."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.codes: list[int] = []
        self._capfd, self._stderr = capfd, ""

    def exit(self, code: int) -> None:
        """Replacement for `os._exit` that returns."""
        self.codes.append(code)

    @property
    def lines(self) -> list[str]:
        self._stderr += self._capfd.readouterr().err
        return self._stderr.splitlines()


@pytest.fixture
def exit_recorder(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> ExitRecorder:
    recorder = ExitRecorder(capfd)
    monkeypatch.setattr(os, "_exit", recorder.exit)
    monkeypatch.setattr(control, "HEARTBEAT_INTERVAL", 0.02)
    monkeypatch.setattr(control, "HEARTBEAT_TIMEOUT", 1.0)
    monkeypatch.setattr(control, "resume_command", lambda: "mlxgpt train")
    return recorder


@pytest.fixture
def ranks(exit_recorder: ExitRecorder) -> Iterator[list[ControlChannel]]:
    before = threading.active_count()
    channels = connect_ranks(3)
    yield channels
    for channel in channels:
        channel.close()
    wait_until(lambda: threading.active_count() == before)


def connect_ranks(size: int) -> list[ControlChannel]:
    listener, address = rendezvous.open_listener("127.0.0.1")
    address["name"] = "here"
    with ThreadPoolExecutor(size) as pool:
        main_future = pool.submit(rendezvous.accept_peers, listener, size, address["password"])
        peer_futures = [
            pool.submit(rendezvous.connect_to_main, address, rank) for rank in range(1, size)
        ]
        peers = [main_future.result(), *(future.result() for future in peer_futures)]
    return [ControlChannel(rank, size, peers[rank]) for rank in range(size)]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def call_on_all_ranks(
    ranks: list[ControlChannel], call: Callable[[ControlChannel], Any]
) -> list[Any]:
    """Call a function on all ranks in parallel; return each rank's result."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(call, ranks))


def start_threads(calls: list[Callable[[], Any]]) -> None:
    """Run each call in a daemon thread; it may block forever, or fail after `os._exit` returned."""

    def run(call: Callable[[], Any]) -> None:
        with contextlib.suppress(Exception):
            call()

    for call in calls:
        threading.Thread(target=run, args=(call,), daemon=True).start()


def test_values_reach_all_ranks_in_order(
    ranks: list[ControlChannel], exit_recorder: ExitRecorder
) -> None:
    values = [{"n": 0}, "one", [2]]
    for _ in range(20):
        gathered = call_on_all_ranks(ranks, lambda r: r.gather("values", values[r.rank]))
        assert gathered == [values] * 3
        call_on_all_ranks(ranks, lambda r: r.barrier("between"))
        received = call_on_all_ranks(ranks, lambda r: r.broadcast("value", (1, "ü")))
        assert received == [[1, "ü"]] * 3
    assert [rank.position.number for rank in ranks] == [60] * 3
    assert exit_recorder.codes == []


def test_the_main_rank_can_be_many_broadcasts_ahead(
    ranks: list[ControlChannel], exit_recorder: ExitRecorder
) -> None:
    for n in range(200):
        ranks[0].broadcast("ahead", n)
    time.sleep(0.2)  # ten heartbeats
    for rank in ranks[1:]:
        assert [rank.broadcast("ahead") for _ in range(200)] == list(range(200))
    assert exit_recorder.codes == []


def test_a_rank_that_closed_its_channel_is_not_reported_as_lost(
    ranks: list[ControlChannel], exit_recorder: ExitRecorder
) -> None:
    ranks[2].close()
    time.sleep(0.2)
    assert exit_recorder.codes == []


def test_a_lost_rank_is_reported_and_all_ranks_exit(
    ranks: list[ControlChannel], exit_recorder: ExitRecorder
) -> None:
    ranks[2]._closed.set()
    ranks[2].peers[0].socket.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: len(exit_recorder.codes) == 2)
    assert exit_recorder.codes == [control.EXIT_RANK_LOST] * 2
    assert exit_recorder.lines == [
        f"mlxgpt: lost rank 2 of 3 (on {HOSTNAME}): its connection was closed",
        "  → the same command resumes: mlxgpt train",
    ]


def test_a_lost_main_rank_is_reported_by_the_others(
    ranks: list[ControlChannel], exit_recorder: ExitRecorder
) -> None:
    ranks[0]._closed.set()
    for peer in ranks[0].peers.values():
        peer.socket.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: len(exit_recorder.codes) == 2)
    lines = [line for line in exit_recorder.lines if line.startswith("mlxgpt: ")]
    assert lines == ["mlxgpt: lost rank 0 of 3 (on here): its connection was closed"] * 2


def test_a_missing_heartbeat_ends_all_ranks_once_the_timeout_is_set(
    ranks: list[ControlChannel], exit_recorder: ExitRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks[1].peers[0], "send", lambda message: None)
    time.sleep(1.2)
    assert exit_recorder.codes == []
    ranks[0].heartbeat_timeout = control.HEARTBEAT_TIMEOUT
    wait_until(lambda: len(exit_recorder.codes) == 3)
    assert exit_recorder.lines[0].startswith(
        f"mlxgpt: lost rank 1 of 3 (on {HOSTNAME}): no heartbeat for "
    )


def test_another_ranks_error_is_printed_by_the_main_rank(
    ranks: list[ControlChannel], exit_recorder: ExitRecorder
) -> None:
    ranks[1].abort("no memory", "buy some.")  # returns, because `os._exit` is replaced
    wait_until(lambda: len(exit_recorder.codes) == 3)
    assert exit_recorder.codes == [control.EXIT_USER_ERROR] * 3
    assert exit_recorder.lines == [
        f"mlxgpt: rank 1 of 3 (on {HOSTNAME}): no memory",
        "  → buy some.",
    ]


def test_the_main_ranks_error_is_printed_by_its_caller(
    ranks: list[ControlChannel], exit_recorder: ExitRecorder
) -> None:
    ranks[0].abort("no memory", "buy some.")
    wait_until(lambda: len(exit_recorder.codes) == 2)
    assert exit_recorder.codes == [control.EXIT_USER_ERROR] * 2
    assert exit_recorder.lines == []


@pytest.mark.parametrize(
    ("sums", "problem"),
    [
        ([(5, 4), (4, 4), (5, 4)], f"lost rank 1 of 3 (on {HOSTNAME}): it stopped making progress"),
        ([(4, 4), (5, 4), (5, 4)], f"lost rank 0 of 3 (on {HOSTNAME}): it stopped making progress"),
        ([(5, 4), (5, 4), (5, 4)], "timeout: all 3 ranks are still waiting in all-reduce loss"),
    ],
)
def test_a_stalled_rank_is_reported(
    ranks: list[ControlChannel],
    exit_recorder: ExitRecorder,
    sums: list[tuple[int, int]],
    problem: str,
) -> None:
    for rank, counts in zip(ranks, sums, strict=True):
        rank.position = Position(counts[0], "all-reduce loss", *counts)
    time.sleep(1.2)
    assert exit_recorder.codes == [], "not before steps are watched"
    ranks[0].step_seconds = 0.0
    wait_until(
        lambda: len(exit_recorder.codes) == 3
    )  # the main rank ends the others before it prints
    assert exit_recorder.lines[0] == f"mlxgpt: {problem}"


def test_ranks_that_make_progress_are_not_stopped(
    ranks: list[ControlChannel], exit_recorder: ExitRecorder
) -> None:
    ranks[0].step_seconds = 0.0
    for _ in range(40):
        for rank in ranks:
            with rank.all_reduce("loss"):
                time.sleep(0.02)
    assert ranks[2].position == Position(40, "all-reduce loss", 40, 40)
    assert exit_recorder.codes == []


@pytest.mark.parametrize("early", range(3))
def test_different_collectives_end_all_ranks(exit_recorder: ExitRecorder, early: int) -> None:
    """In any order of calls; each rank waits for a message that no other rank sends."""

    def reduce(rank: ControlChannel) -> None:
        with rank.all_reduce("gradients of 10 float32"):
            threading.Event().wait(60)  # MLX would block here

    ranks = connect_ranks(3)
    call_on_all_ranks(ranks, lambda r: r.barrier("start"))
    calls: list[Callable[[], Any]] = [
        lambda: ranks[0].gather("settings", 0),
        lambda: ranks[1].broadcast("plan"),
        lambda: reduce(ranks[2]),
    ]
    start_threads([calls.pop(early)])
    time.sleep(0.1)
    start_threads(calls)
    wait_until(lambda: len(exit_recorder.codes) == 3)
    assert exit_recorder.codes == [control.EXIT_RANK_LOST] * 3
    problem, remedy = exit_recorder.lines
    assert problem.startswith("mlxgpt: the ranks are in different collectives: ")
    positions = dict(zip(("0", "1"), problem.split("rank ")[1:], strict=False))
    assert positions["0"].startswith(f"0 of 3 (on {HOSTNAME}) in gather settings (number 2), ")
    assert "the same command and mlxgpt version on all machines" in remedy


@pytest.mark.parametrize(
    ("main", "other"),
    [
        ("gather", "gather"),
        ("broadcast", "broadcast"),
        ("barrier", "barrier"),
        ("gather", "broadcast"),
        ("broadcast", "gather"),
        ("all_reduce", "all_reduce"),
        ("all_reduce", "gather"),
        ("gather", "all_reduce"),
        ("broadcast", "all_reduce"),
        ("all_reduce", "broadcast"),
    ],
)
@pytest.mark.parametrize("waiting", [0, 1])
def test_every_pair_of_different_collectives_is_detected(
    exit_recorder: ExitRecorder, main: str, other: str, waiting: int
) -> None:
    """Each rank reports its position although both are blocked."""

    def enter(rank: ControlChannel, kind: str, name: str) -> None:
        if kind == "gather":
            rank.gather(name, 1)
        elif kind == "broadcast":
            rank.broadcast(name, 1)
            rank.barrier("next")
        elif kind == "barrier":
            rank.barrier(name)
        else:
            with rank.all_reduce(name):
                threading.Event().wait(60)

    ranks = connect_ranks(2)
    calls = [lambda: enter(ranks[0], main, "a"), lambda: enter(ranks[1], other, "b")]
    start_threads([calls[waiting]])
    time.sleep(0.1)
    start_threads([calls[1 - waiting]])
    wait_until(lambda: len(exit_recorder.codes) == 2)
    assert exit_recorder.codes == [control.EXIT_RANK_LOST] * 2
    (problem, _) = exit_recorder.lines
    assert f"rank 1 of 2 (on {HOSTNAME}) in {other.replace('_', '-')} b (number 1)" in problem


def test_a_receiver_rejects_a_value_with_the_wrong_name(
    exit_recorder: ExitRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for the main rank to compare the positions."""
    monkeypatch.setattr(ControlChannel, "_compare_order", lambda self: None)
    ranks = connect_ranks(2)
    start_threads([partial(ranks[0].broadcast, "a", 1), partial(ranks[1].broadcast, "b")])
    wait_until(lambda: len(exit_recorder.codes) == 2)
    (problem, _) = exit_recorder.lines
    assert problem.startswith(f"mlxgpt: rank 1 of 2 (on {HOSTNAME}): the ranks are in different")
    assert (
        f"rank 0 of 2 (on here) in broadcast a (number 1), rank 1 of 2 (on {HOSTNAME}) in"
        in problem
    )


def test_a_rank_one_collective_behind_is_detected(exit_recorder: ExitRecorder) -> None:
    """The collectives have the same name but different numbers, as when one rank skips a call."""
    ranks = connect_ranks(2)
    call_on_all_ranks(ranks, lambda r: r.barrier("start"))
    ranks[0].broadcast("only here")
    start_threads([partial(r.gather, "loss", 1) for r in ranks])
    wait_until(lambda: len(exit_recorder.codes) == 2)
    assert "rank 1 of 2" in exit_recorder.lines[0]
    assert "in gather loss (number 2)" in exit_recorder.lines[0]
