"""The control channel between ranks: small values, heartbeats, and the order of collectives.

A rank in an all-reduce waits forever for a rank that has died, and runs no Python: no signal
reaches it. So each rank has a connection to the main rank, with threads that exchange heartbeats.
When a rank is lost, these threads end the process.

Every collective has a name and a number. Each rank reports those that it has entered, with the next
value or heartbeat, and the main rank compares them with its own. Ranks that are in different
collectives, and would wait for each other forever or mix up their values, end with an error that
says where each of them is.

The main rank listens only until all ranks have connected. A rank proves who it is by the job's
password, which MLX's own all-reduce has distributed. A message is a JSON object on one line.
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
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, replace
from queue import SimpleQueue
from typing import Any

from mlxgpt.distributed.launcher import resume_command
from mlxgpt.utils.errors import UserError


@dataclass(frozen=True)
class Position:
    """How far a rank has come.

    Attributes:
        number: collectives that it has entered.
        name: the last one of them, such as `gather settings`.
        all_reduces_started, all_reduces_finished: how many of them are all-reduces of arrays.
    """

    number: int = 0
    name: str = "no collective yet"
    all_reduces_started: int = 0
    all_reduces_finished: int = 0

    def __str__(self) -> str:
        return f"{self.name} (number {self.number:,})"


@dataclass
class Peer:
    """Another rank, at the other end of a connection.

    Attributes:
        rank: its number; host: its machine's name.
        last_heartbeat: when it last sent anything (`time.monotonic`).
        has_left: whether it has closed its channel.
        position: by its last message.
        names: collectives that it has entered and that were not compared yet, by number.
        inbox: values that it has sent, in order.
    """

    rank: int
    host: str
    socket: socket.socket
    last_heartbeat: float = field(default_factory=time.monotonic)
    has_left: bool = False
    position: Position = Position()
    names: dict[int, str] = field(default_factory=dict)
    inbox: SimpleQueue[dict[str, Any]] = field(default_factory=SimpleQueue)
    _send_lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. If the peer is gone, the listening thread ends the process."""
        line = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError), self._send_lock:
            self.socket.sendall(line)


HEARTBEAT_INTERVAL = 1.0  # seconds
HEARTBEAT_TIMEOUT = 7.0  # seconds without a heartbeat until a rank counts as lost
# Seconds, before the first step: preparing data can block Python for long.
STARTUP_HEARTBEAT_TIMEOUT = 600.0
EXIT_RANK_LOST = 1  # exit code after a rank was lost
EXIT_USER_ERROR = 2  # exit code after a user's mistake, on any rank
MAX_LINE_BYTES = 1 << 24  # of an unfinished message, until its sender counts as lost
MAX_COLLECTIVE_NAMES = 1000  # collectives that the main rank remembers by name


class ControlChannel:
    """A rank's connections: the main rank's to all others, another rank's to the main rank.

    Attributes:
        position: how far this rank has come.
        step_seconds: duration of a training step while steps are watched, else None.
        heartbeat_timeout: seconds without a heartbeat until a rank counts as lost.

    Args:
        rank: of this process; size: number of ranks.
        peers: by rank.
    """

    def __init__(self, rank: int, size: int, peers: dict[int, Peer]) -> None:
        self.rank, self.size, self.peers = rank, size, peers
        self.position = Position()
        self.step_seconds: float | None = None
        self.heartbeat_timeout = STARTUP_HEARTBEAT_TIMEOUT
        # Collectives by number: the main rank's latest, or those that another one has not reported.
        self._names: dict[int, str] = {}
        self._report_lock, self._end_lock = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._last_progress: tuple[Any, float] = (None, 0.0)  # all positions, and since when
        for peer in peers.values():
            peer.last_heartbeat = time.monotonic()
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()
        threading.Thread(target=self._send_heartbeats, daemon=True).start()

    def gather(self, name: str, value: Any) -> list[Any]:
        """Every rank's value (JSON), in the order of ranks, on all ranks."""
        return self._gather(f"gather {name}", value)

    def broadcast(self, name: str, value: Any = None) -> Any:
        """The main rank's value (JSON), on all ranks."""
        self._enter(f"broadcast {name}")
        return self._receive(self.peers[0]) if self.rank else self._send_to_all(value)

    def barrier(self, name: str) -> None:
        """Wait until every rank is here."""
        self._gather(f"barrier {name}", None)

    @contextlib.contextmanager
    def all_reduce(self, name: str) -> Iterator[None]:
        """Announce an all-reduce of arrays, while MLX carries it out."""
        self._enter(f"all-reduce {name}")
        started = self.position.all_reduces_started + 1
        self.position = replace(self.position, all_reduces_started=started)
        yield
        self.position = replace(self.position, all_reduces_finished=started)

    def close(self) -> None:
        """Leave the group; the other ranks may continue."""
        for peer in self.peers.values():
            peer.send({"bye": True})
        self._closed.set()

    def abort(self, problem: str, remedy: str, exit_code: int = EXIT_USER_ERROR) -> None:
        """End all ranks because of an error on this one, with an exit code. The main rank's own
        error is printed by its caller, that of another rank by the main rank. The other rank waits
        for that: a launcher would end the main rank before it has printed anything.
        """
        with self._end_lock:
            for peer in self.peers.values():
                peer.send({"end": [problem, remedy, exit_code]})
            if self.rank == 0:
                self._closed.set()
        if self.rank:
            self._closed.wait(5 * HEARTBEAT_INTERVAL)

    def _gather(self, name: str, value: Any) -> list[Any]:
        self._enter(name)
        if self.rank:
            self._send(self.peers[0], value=value)
            return list(self._receive(self.peers[0]))
        values = [self._receive(self.peers[rank]) for rank in range(1, self.size)]
        return list(self._send_to_all([value, *values]))

    def _enter(self, name: str) -> None:
        number = self.position.number + 1
        self._names[number] = name
        self._names.pop(number - MAX_COLLECTIVE_NAMES, None)
        self.position = replace(self.position, number=number, name=name)

    def _send(self, peer: Peer, **message: Any) -> None:
        """Send a message with this rank's position; from another rank than the main one also with
        the names that it has not reported.
        """
        with self._report_lock:  # names must not arrive after a value that was sent later
            message["at"] = astuple(self.position)
            if self.rank:
                message["names"] = [[n, self._names.pop(n)] for n in list(self._names)]
            peer.send(message)

    def _send_to_all(self, value: Any) -> Any:
        for peer in self.peers.values():
            self._send(peer, value=value)
        return json.loads(json.dumps(value))  # the same types on all ranks

    def _receive(self, peer: Peer) -> Any:
        message = peer.inbox.get()
        if self.rank == 0:
            self._compare_order()
        position = Position(*message["at"])
        if (position.number, position.name) != (self.position.number, self.position.name):
            peer.position = position
            self._end_mismatch()
        return message["value"]

    def _listen(self, peer: Peer) -> None:
        with peer.socket:
            self._receive_messages(peer)

    def _receive_messages(self, peer: Peer) -> None:
        buffer = b""
        while not self._closed.is_set():
            if not select.select([peer.socket], [], [], HEARTBEAT_INTERVAL)[0]:
                silence = time.monotonic() - peer.last_heartbeat
                if silence > self.heartbeat_timeout and not peer.has_left:
                    self._end_lost_rank(peer, f"no heartbeat for {silence:.0f} s")
                continue
            try:
                received = peer.socket.recv(1 << 16)
            except OSError:
                received = b""
            peer.last_heartbeat = time.monotonic()
            *lines, buffer = (buffer + received).split(b"\n")
            for line in lines:
                self._handle_message(peer, json.loads(line))
            if not received or len(buffer) > MAX_LINE_BYTES:
                if not peer.has_left:
                    self._end_lost_rank(peer, "its connection was closed")
                return

    def _handle_message(self, peer: Peer, message: dict[str, Any]) -> None:
        if "at" in message:
            peer.position = Position(*message["at"])
            peer.names |= dict(message.get("names", []))
        if "value" in message:
            peer.inbox.put(message)
        elif "bye" in message:
            peer.has_left = True
        elif "end" in message:
            problem, remedy, exit_code = message["end"]
            if self.rank or problem is None:  # the main rank has printed it
                self._end_process(None, None, exit_code)
            else:
                time.sleep(HEARTBEAT_INTERVAL)  # this rank may be about to refuse the same
                self._end_process(f"{self._describe_peer(peer)}: {problem}", remedy, exit_code)

    def _send_heartbeats(self) -> None:
        while not self._closed.wait(HEARTBEAT_INTERVAL):
            for peer in self.peers.values():
                if not peer.has_left:
                    self._send(peer)
            if self.rank == 0:
                self._compare_order()
                if self.step_seconds is not None:
                    self._compare_progress(max(HEARTBEAT_TIMEOUT, 10 * self.step_seconds))

    def _compare_order(self) -> None:
        """At the main rank: end all ranks where one has entered another collective than this rank
        in its place. One that is ahead is compared when this rank is there.
        """
        for peer in self.peers.values():
            for number, name in list(peer.names.items()):
                if self._names.get(number, name) != name:
                    self._end_mismatch(number)
                if number <= self.position.number:
                    peer.names.pop(number, None)

    def _compare_progress(self, timeout: float) -> None:
        """End all ranks where one does not come to an all-reduce that others wait in, or where all
        wait in one.
        """
        positions = {0: self.position} | {rank: peer.position for rank, peer in self.peers.items()}
        furthest = max(p.all_reduces_started for p in positions.values())
        lagging = [rank for rank, p in positions.items() if p.all_reduces_started < furthest]
        all_waiting = not lagging and all(
            p.all_reduces_finished < p.all_reduces_started for p in positions.values()
        )
        now, (previous, since) = time.monotonic(), self._last_progress
        if not (lagging or all_waiting) or positions != previous:
            self._last_progress = positions, now
        elif now - since > timeout:
            if all_waiting:
                name = self.position.name
                self._end_process(
                    f"timeout: all {self.size} ranks are still waiting in {name}",
                    None,
                    EXIT_RANK_LOST,
                )
            for rank in lagging:
                self._end_lost_rank(self.peers.get(rank), "it stopped making progress")

    def _describe_peer(self, peer: Peer | None) -> str:
        """A peer, or this rank, in words."""
        rank, host = (peer.rank, peer.host) if peer else (self.rank, socket.gethostname())
        return f"rank {rank} of {self.size} (on {host})"

    def _end_lost_rank(self, peer: Peer | None, reason: str) -> None:
        self._end_process(f"lost {self._describe_peer(peer)}: {reason}", None, EXIT_RANK_LOST)

    def _end_mismatch(self, number: int = 0) -> None:
        """End all ranks, saying in which collective each of them is, or was at that number."""
        ranks = [(self.rank, self._describe_peer(None), self._names.get(number), self.position)]
        ranks += [
            (peer.rank, self._describe_peer(peer), peer.names.get(number), peer.position)
            for peer in self.peers.values()
        ]
        locations = [
            f"{description} in {f'{name} (number {number:,})' if name else position}"
            for _, description, name, position in sorted(ranks)
        ]
        problem = f"the ranks are in different collectives: {', '.join(locations)}"
        remedy = (
            "run the same command and mlxgpt version on all machines; if they match, report a bug."
        )
        if self.rank:
            self.abort(problem, remedy, EXIT_RANK_LOST)
        self._end_process(problem, remedy, EXIT_RANK_LOST)

    def _end_process(self, problem: str | None, remedy: str | None, exit_code: int) -> None:
        """End this process and, from the main rank, all others."""
        with self._end_lock:
            if self._closed.is_set():  # this rank has left, or ends already
                return
            if self.rank == 0:
                for peer in self.peers.values():
                    peer.send({"end": [None, None, exit_code]})
            # Only now: the listening threads close their connections when they see it, and the
            # other rank would see that first.
            self._closed.set()
            if problem:
                print_error(problem, remedy or f"the same command resumes: {resume_command()}")
            os._exit(exit_code)


def print_error(problem: str, remedy: str) -> None:
    """Print an error as the command line does, straight to file descriptor 2: a stuck thread may
    hold the locks of sys.stderr, of the progress display and of the log handlers.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"mlxgpt: {problem}\n  → {remedy}\n".encode(errors="replace"))


def open_listener(host: str) -> tuple[socket.socket, dict[str, Any]]:
    """Listen on a free port of the main rank; the listener, and what other ranks connect with.

    Raises:
        UserError: if this machine cannot listen there.
    """
    try:
        listener = socket.create_server((host, 0))
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, the address of rank 0: {error.strerror}",
            "list the first machine under its own address in the hostfile.",
        ) from error
    password = secrets.token_hex(16)
    return listener, {"host": host, "port": listener.getsockname()[1], "password": password}


CONNECT_TIMEOUT = 30.0  # seconds for all ranks to connect


def accept_peers(listener: socket.socket, size: int, password: str) -> dict[int, Peer]:
    """The other ranks, once all have connected to the main rank.

    Raises:
        UserError: if one does not connect in time.
    """
    peers: dict[int, Peer] = {}
    deadline = time.monotonic() + CONNECT_TIMEOUT
    with listener:
        while len(peers) < size - 1:
            listener.settimeout(max(0.1, deadline - time.monotonic()))
            connection = None
            try:
                connection, _ = listener.accept()
                connection.settimeout(2.0)
                hello = json.loads(_read_line(connection))
                is_authentic = hmac.compare_digest(str(hello["password"]), password)
                rank, host = int(hello["rank"]), str(hello["host"])
                if not is_authentic or not 0 < rank < size or rank in peers:
                    raise ValueError("not a rank of this job")
            except (OSError, ValueError, KeyError, TypeError):
                if connection:
                    connection.close()
                if time.monotonic() > deadline:
                    missing = ", ".join(str(n) for n in range(1, size) if n not in peers)
                    raise UserError(
                        f"no connection from rank {missing} within {CONNECT_TIMEOUT:.0f} s",
                        "check the firewall: the machines must reach each other on all ports.",
                    ) from None
                continue
            peers[rank] = _make_peer(rank, host, connection)
    return peers


def connect_to_main(address: dict[str, Any], rank: int) -> dict[int, Peer]:
    """The main rank, once this rank has connected to it.

    Raises:
        UserError: if it does not answer.
    """
    try:
        connection = socket.create_connection((address["host"], address["port"]), CONNECT_TIMEOUT)
    except OSError as error:
        raise UserError(
            f"cannot connect to rank 0 at {address['host']}: {error.strerror or error}",
            "check the firewall: the machines must reach each other on all ports.",
        ) from error
    peer = _make_peer(0, address["name"], connection)
    peer.send({"password": address["password"], "rank": rank, "host": socket.gethostname()})
    return {0: peer}


def _make_peer(rank: int, host: str, connection: socket.socket) -> Peer:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Peer(rank, host, connection)


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < 1000:
        byte = connection.recv(1)
        if not byte:
            raise ValueError("the connection was closed")
        line += byte
    return line
