"""What several machines tell each other beside tensors, and who notices that one of them is gone.

A rank that waits in a sum for another one that is dead waits for ever, and runs no Python: no
signal reaches it. So each rank has a connection to the first one, and threads that ask for a sign
of life there. When one is gone, they end the process.

The first rank listens while the others connect, and no longer; who cannot say the run's password,
which was spread by MLX's own sums, is not let in. What is said is JSON, one object a line.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from mlxgpt.errors import UserError

BEAT = 1.0  # seconds between two signs of life
SILENCE = 7.0  # seconds without one, and a rank is lost
PATIENCE = 600.0  # the same while a text is prepared, when Python may be held up for long
CONNECT = 30.0  # seconds for all to connect
LOST = 1  # exit code
REFUSED = 2  # the same where a rank refused what a user can mend
LONGEST = 1 << 24  # bytes of a line

Tell = Callable[[str, str | None], None]  # what is wrong, and what to do if that is known


@dataclass
class Peer:
    """Another rank, at the other end of a connection.

    Attributes:
        rank: its number; host: its machine's name.
        heard: when it last gave a sign of life.
        done: whether it has said that it leaves.
        at: how many sums it has begun and ended.
        said: what it has said, in order.
    """

    rank: int
    host: str
    socket: socket.socket
    heard: float = field(default_factory=time.monotonic)
    done: bool = False
    at: tuple[int, int] = (0, 0)
    said: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def send(self, tree: dict[str, Any]) -> None:
        """Say something. Where the other is gone, the thread that listens ends the process."""
        line = json.dumps(tree).encode() + b"\n"
        with contextlib.suppress(OSError), self._sending:
            self.socket.sendall(line)


class Channel:
    """A rank's connections: the first one's to all others, another one's to the first.

    Attributes:
        at: how many sums this rank has begun and ended; told with each sign of life.
        slowest: seconds that a step takes at the most; None: no sums are to be watched now.

    Args:
        rank, size: this one's number, and of how many.
        peers: by their rank.
        tell: is told why this process ends right after, from another thread.
    """

    def __init__(self, rank: int, size: int, peers: dict[int, Peer], tell: Tell) -> None:
        self.rank, self.size, self.peers = rank, size, peers
        self.at = (0, 0)
        self.slowest: float | None = None
        self.patience = PATIENCE
        self._tell = tell
        self._ending = threading.Lock()
        self._closed = threading.Event()
        self._stuck: tuple[Any, float] = (None, 0.0)  # who has come how far, and since when
        for peer in peers.values():
            peer.heard = time.monotonic()
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def gather(self, tree: Any) -> list[Any]:
        """What each rank says, on all of them; it waits for all."""
        if self.rank:
            self.peers[0].send({"say": tree})
            return list(self.peers[0].said.get())
        others = [self.peers[rank].said.get() for rank in range(1, self.size)]
        return self.spread([tree, *others])

    def spread(self, tree: Any = None) -> Any:
        """What the first rank says, on all of them."""
        if self.rank:
            return self.peers[0].said.get()
        for peer in self.peers.values():
            peer.send({"say": tree})
        return json.loads(json.dumps(tree))  # of the same types for all

    def close(self) -> None:
        """Leave: the others need not worry."""
        for peer in self.peers.values():
            peer.send({"bye": True})
        self._closed.set()

    def refuse(self, problem: str, remedy: str) -> None:
        """Tell the first rank why this one ends; the first tells all others, and ends them. Any
        other rank waits for that: a launcher would end the first one before it has said so.
        """
        with self._ending:
            for peer in self.peers.values():
                peer.send({"end": [problem, remedy, REFUSED]})
            if self.rank == 0:
                self._closed.set()
        if self.rank:
            self._closed.wait(5 * BEAT)

    def _listen(self, peer: Peer) -> None:
        with peer.socket:
            self._listen_to(peer)

    def _listen_to(self, peer: Peer) -> None:
        rest = b""
        while not self._closed.is_set():
            if not select.select([peer.socket], [], [], BEAT)[0]:
                silent = time.monotonic() - peer.heard
                if silent > self.patience and not peer.done:
                    self._lost(peer, f"has given no sign of life for {silent:.0f} s")
                continue
            try:
                some = peer.socket.recv(1 << 16)
            except OSError:
                some = b""
            peer.heard = time.monotonic()
            *lines, rest = (rest + some).split(b"\n")
            for line in lines:
                self._hear(peer, json.loads(line))
            if not some or len(rest) > LONGEST:
                if not peer.done:
                    self._lost(peer, "is gone")
                return

    def _hear(self, peer: Peer, said: dict[str, Any]) -> None:
        if "say" in said:
            peer.said.put(said["say"])
        elif "at" in said:
            peer.at = tuple(said["at"])
        elif "bye" in said:
            peer.done = True
        elif "end" in said:
            problem, remedy, code = said["end"]
            if self.rank or problem is None:  # the first one has told it
                self._end(None, None, code)
            else:
                time.sleep(BEAT)  # this one may be about to say the same
                self._end(f"{self._name(peer)}: {problem}", remedy, code)

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            for peer in self.peers.values():
                if not peer.done:
                    peer.send({"at": self.at})
            if self.rank == 0 and self.slowest is not None:
                self._watch(max(SILENCE, 10 * self.slowest))

    def _watch(self, longest: float) -> None:
        """End it where a rank does not come to a sum that others wait in, or all wait in one."""
        at = {0: self.at, **{rank: peer.at for rank, peer in self.peers.items()}}
        begun = [one for one, _ in at.values()]
        behind = [rank for rank, (one, _) in at.items() if one < max(begun)]
        all_wait = not behind and all(ended < one for one, ended in at.values())
        now, state = time.monotonic(), sorted(at.items())
        before, since = self._stuck
        if not (behind or all_wait) or state != before:
            self._stuck = state, now
        elif now - since > longest:
            if all_wait:
                self._end(f"all {self.size} ranks wait in a sum that does not end", None, LOST)
            for rank in behind:
                name = "the first rank" if not rank else self._name(self.peers[rank])
                self._end(f"{name} lives, and takes no more steps", None, LOST)

    def _name(self, peer: Peer) -> str:
        return f"rank {peer.rank} of {self.size} (on {peer.host})"

    def _lost(self, peer: Peer, how: str) -> None:
        self._end(f"{self._name(peer)} {how}", None, LOST)

    def _end(self, problem: str | None, remedy: str | None, code: int) -> None:
        """End this process, and at the first rank all others."""
        with self._ending:
            if self._closed.is_set():  # by its own will, meanwhile
                return
            if self.rank == 0:
                for peer in self.peers.values():
                    peer.send({"end": [None, None, code]})
            # Not before: who listens closes its connection then, which the other would hear first.
            self._closed.set()
            if problem:
                with contextlib.suppress(Exception):
                    self._tell(problem, remedy)
            os._exit(code)


def listen(host: str) -> tuple[socket.socket, dict[str, Any]]:
    """A listener on a free port of the first rank, and what the others have to know of it.

    Raises:
        UserError: if it cannot listen there.
    """
    try:
        listener = socket.create_server((host, 0))
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, the first rank's address: {error.strerror}",
            "give an address of the machine that comes first in the hostfile.",
        ) from error
    password = secrets.token_hex(16)
    return listener, {"host": host, "port": listener.getsockname()[1], "password": password}


def accept(listener: socket.socket, size: int, password: str) -> dict[int, Peer]:
    """The other ranks, once all have connected.

    Raises:
        UserError: if they do not.
    """
    peers: dict[int, Peer] = {}
    deadline = time.monotonic() + CONNECT
    with listener:
        while len(peers) < size - 1:
            listener.settimeout(max(0.1, deadline - time.monotonic()))
            connection = None
            try:
                connection, _ = listener.accept()
                connection.settimeout(2.0)
                said = json.loads(_line(connection))
                known = hmac.compare_digest(str(said["password"]), password)
                rank, host = int(said["rank"]), str(said["host"])
                if not known or not 0 < rank < size or rank in peers:
                    raise ValueError("nobody of ours")
            except (OSError, ValueError, KeyError, TypeError):
                if connection:
                    connection.close()
                if time.monotonic() > deadline:
                    missing = ", ".join(str(n) for n in range(1, size) if n not in peers)
                    raise UserError(
                        f"no connection came from rank {missing} within {CONNECT:.0f} s",
                        "let the machines reach each other on any port: is there a firewall?",
                    ) from None
                continue
            peers[rank] = _peer(rank, host, connection)
    return peers


def connect(place: dict[str, Any], rank: int) -> dict[int, Peer]:
    """The first rank, from another one.

    Raises:
        UserError: if it cannot be reached.
    """
    try:
        connection = socket.create_connection((place["host"], place["port"]), CONNECT)
    except OSError as error:
        raise UserError(
            f"cannot reach the first rank at {place['host']}: {error.strerror or error}",
            "let the machines reach each other on any port: is there a firewall?",
        ) from error
    peer = _peer(0, place["name"], connection)
    peer.send({"password": place["password"], "rank": rank, "host": socket.gethostname()})
    return {0: peer}


def _peer(rank: int, host: str, connection: socket.socket) -> Peer:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Peer(rank, host, connection)


def _line(connection: socket.socket) -> bytes:
    said = b""
    while not said.endswith(b"\n") and len(said) < 1000:
        some = connection.recv(1)
        if not some:
            raise ValueError("it said nothing")
        said += some
    return said
