"""Ranks that talk, and one that says nothing, over the loopback."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlxgpt.distributed import control as channel
from mlxgpt.distributed.control import Channel
from mlxgpt.errors import UserError


class Fate:
    """What became of ranks: whether they ended, and what they said."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str | None]] = []
        self.codes: list[int] = []

    def tell(self, problem: str, remedy: str | None) -> None:
        self.said.append((problem, remedy))

    def exit(self, code: int) -> None:
        self.codes.append(code)


@pytest.fixture
def fate(monkeypatch: pytest.MonkeyPatch) -> Fate:
    fate = Fate()
    monkeypatch.setattr(os, "_exit", fate.exit)
    monkeypatch.setattr(channel, "BEAT", 0.02)
    monkeypatch.setattr(channel, "SILENCE", 1.0)
    return fate


@pytest.fixture
def ranks(fate: Fate) -> Iterator[list[Channel]]:
    before = threading.active_count()
    found = connected(3, fate)
    yield found
    for one in found:
        one.close()
    until(lambda: threading.active_count() == before)


def connected(size: int, fate: Fate) -> list[Channel]:
    listener, place = channel.listen("127.0.0.1")
    place["name"] = "here"
    with ThreadPoolExecutor(size) as pool:
        first = pool.submit(channel.accept, listener, size, place["password"])
        others = [pool.submit(channel.connect, place, rank) for rank in range(1, size)]
        peers = [first.result(), *(one.result() for one in others)]
    return [Channel(rank, size, of_it, fate.tell) for rank, of_it in enumerate(peers)]


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_each_says_reaches_all(ranks: list[Channel], fate: Fate) -> None:
    said = [{"n": 0}, "one", [2]]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(20):
            heard = list(pool.map(lambda one: one.gather(said[one.rank]), ranks))
            assert heard == [said] * 3
            spread = list(pool.map(lambda one: one.spread((1, "ü")), ranks))
            assert spread == [[1, "ü"]] * 3
    assert fate.codes == []


def test_who_leaves_is_not_missed(ranks: list[Channel], fate: Fate) -> None:
    ranks[2].close()
    time.sleep(0.2)
    assert fate.codes == []


def test_who_is_gone_is_named_and_all_end(ranks: list[Channel], fate: Fate) -> None:
    ranks[2]._closed.set()
    ranks[2].peers[0].socket.shutdown(socket.SHUT_RDWR)
    until(lambda: len(fate.codes) == 2)
    assert fate.codes == [channel.LOST] * 2
    ((problem, remedy),) = fate.said
    assert problem == f"rank 2 of 3 (on {socket.gethostname()}) is gone"
    assert remedy is None


def test_the_first_one_gone_is_told_by_the_others(ranks: list[Channel], fate: Fate) -> None:
    ranks[0]._closed.set()
    for peer in ranks[0].peers.values():
        peer.socket.shutdown(socket.SHUT_RDWR)
    until(lambda: len(fate.codes) == 2)
    assert [problem for problem, _ in fate.said] == ["rank 0 of 3 (on here) is gone"] * 2


def test_silence_is_borne_before_steps_are_taken_only(
    ranks: list[Channel], fate: Fate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks[1].peers[0], "send", lambda tree: None)
    time.sleep(1.2)
    assert fate.codes == []
    ranks[0].patience = channel.SILENCE
    until(lambda: len(fate.codes) == 3)
    assert "rank 1 of 3" in fate.said[0][0]
    assert "no sign of life" in fate.said[0][0]


def test_a_cause_that_can_be_mended_is_told_by_the_first(ranks: list[Channel], fate: Fate) -> None:
    ranks[1].refuse("no memory", "buy some.")  # returns when it is ended, as all others are
    until(lambda: len(fate.codes) == 3)
    assert fate.codes == [channel.REFUSED] * 3
    assert fate.said == [(f"rank 1 of 3 (on {socket.gethostname()}): no memory", "buy some.")]


def test_what_the_first_refuses_it_says_itself(ranks: list[Channel], fate: Fate) -> None:
    ranks[0].refuse("no memory", "buy some.")
    until(lambda: len(fate.codes) == 2)
    assert fate.codes == [channel.REFUSED] * 2
    assert fate.said == []


@pytest.mark.parametrize(
    ("at", "problem"),
    [
        ([(5, 4), (4, 4), (5, 4)], "rank 1 of 3"),
        ([(4, 4), (5, 4), (5, 4)], "the first rank lives, and takes no more steps"),
        ([(5, 4), (5, 4), (5, 4)], "all 3 ranks wait in a sum that does not end"),
    ],
)
def test_a_rank_that_does_not_come_is_named(
    ranks: list[Channel], fate: Fate, at: list[tuple[int, int]], problem: str
) -> None:
    for one, place in zip(ranks, at, strict=True):
        one.at = place
    time.sleep(1.2)
    assert fate.codes == [], "not before steps are taken"
    ranks[0].slowest = 0.0
    until(
        lambda: len(fate.codes) == 3
    )  # the first rank speaks before it ends, but ends the others before
    assert fate.said[0][0].startswith(problem)


def test_who_takes_steps_is_left_alone(ranks: list[Channel], fate: Fate) -> None:
    ranks[0].slowest = 0.0
    for step in range(40):
        for one in ranks:
            one.at = (step + 1, step + (one.rank > 0))
            time.sleep(0.02)
    assert fate.codes == []


def test_a_stranger_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "CONNECT", 0.5)
    listener, place = channel.listen("127.0.0.1")
    for said in (
        b"GET / HTTP/1.1\r\n\r\n",
        json.dumps({"password": "guess", "rank": 1, "host": "x"}).encode() + b"\n",
        json.dumps({"password": place["password"], "rank": 7, "host": "x"}).encode() + b"\n",
        json.dumps([1]).encode() + b"\n",
        b"x" * 5000,
    ):
        with socket.create_connection((place["host"], place["port"])) as stranger:
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
    with pytest.raises(UserError, match="no connection came from rank 1 within"):
        channel.accept(listener, 2, place["password"])


def test_where_nobody_listens_it_says_so() -> None:
    listener, place = channel.listen("127.0.0.1")
    listener.close()
    with pytest.raises(UserError, match="cannot reach the first rank"):
        channel.connect({**place, "name": "here"}, 1)
    with pytest.raises(UserError, match="cannot listen on 192"):
        channel.listen("192.0.2.1")
