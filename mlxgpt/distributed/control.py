"""Control channel between ranks: small values, heartbeats, checks of the order of collectives.

A rank in an all-reduce waits forever for a rank that has died, and cannot handle signals while it
waits. So each rank has a connection to the main rank, with threads that exchange heartbeats and end
the process when a rank is lost.

Every collective has a name and a number. Each rank reports the collectives that it has entered,
with its next value or heartbeat, and the main rank compares them with its own. Ranks in different
collectives would wait forever or mix up their values, so they exit with an error that lists the
position of each rank.

The connections are made by rendezvous.py. Each message is one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, replace
from queue import SimpleQueue
from typing import Any

from mlxgpt.distributed.launcher import resume_command


@dataclass(frozen=True)
class Position:
    """A rank's progress through the collectives.

    Attributes:
        number: number of collectives entered so far.
        name: name of the latest one, such as `gather settings`.
        all_reduces_started, all_reduces_finished: number of all-reduces of arrays among them.
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
        rank: its rank; host: its host name.
        last_heartbeat: when it last sent anything (`time.monotonic`).
        has_left: whether it has closed its channel.
        position: its position as of its latest message.
        names: names of entered collectives that are not compared yet, by number.
        inbox: received values, in order.
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
        """Send a message, ignoring errors; if the peer is gone, the listener ends the process."""
        line = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError), self._send_lock:
            self.socket.sendall(line)


HEARTBEAT_INTERVAL = 1.0  # seconds
HEARTBEAT_TIMEOUT = 7.0  # seconds without a heartbeat until a rank counts as lost
STARTUP_HEARTBEAT_TIMEOUT = 600.0  # seconds; before training, preparing data can block Python
EXIT_RANK_LOST = 1  # exit code after a rank was lost
EXIT_USER_ERROR = 2  # exit code after a UserError on any rank
MAX_LINE_BYTES = 1 << 24  # longest message; the sender of a longer one counts as lost
MAX_COLLECTIVE_NAMES = 1000  # number of collectives whose names a rank remembers


class ControlChannel:
    """A rank's connections: from the main rank to all others, from any other to the main rank.

    Attributes:
        position: this rank's progress.
        step_seconds: duration of a training step while the watchdog is active, else None.
        heartbeat_timeout: seconds without a heartbeat until a rank counts as lost.

    Args:
        rank: rank of this process; size: number of ranks.
        peers: connected peers, by rank.
    """

    def __init__(self, rank: int, size: int, peers: dict[int, Peer]) -> None:
        self.rank, self.size, self.peers = rank, size, peers
        self.position = Position()
        self.step_seconds: float | None = None
        self.heartbeat_timeout = STARTUP_HEARTBEAT_TIMEOUT
        # Names by number: on the main rank the latest collectives, on others the unreported ones.
        self._names: dict[int, str] = {}
        self._report_lock, self._end_lock = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._last_progress: tuple[Any, float] = (None, 0.0)  # positions, last change
        for peer in peers.values():
            peer.last_heartbeat = time.monotonic()
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()
        threading.Thread(target=self._send_heartbeats, daemon=True).start()

    def gather(self, name: str, value: Any) -> list[Any]:
        """Gather every rank's value (JSON) on all ranks, in rank order."""
        return self._gather(f"gather {name}", value)

    def broadcast(self, name: str, value: Any = None) -> Any:
        """Broadcast the main rank's value (JSON) to all ranks."""
        self._enter(f"broadcast {name}")
        return self._receive(self.peers[0]) if self.rank else self._send_to_all(value)

    def barrier(self, name: str) -> None:
        """Wait until every rank has reached this barrier."""
        self._gather(f"barrier {name}", None)

    @contextlib.contextmanager
    def all_reduce(self, name: str) -> Iterator[None]:
        """Context that reports an all-reduce of arrays as in progress, while MLX runs it."""
        self._enter(f"all-reduce {name}")
        started = self.position.all_reduces_started + 1
        self.position = replace(self.position, all_reduces_started=started)
        try:
            yield
        except RuntimeError:
            # MLX may notice a lost rank first; the channel's threads then report it, at the latest
            # after the heartbeat timeout, and end the process.
            time.sleep(HEARTBEAT_TIMEOUT + 2 * HEARTBEAT_INTERVAL)
            raise
        self.position = replace(self.position, all_reduces_finished=started)

    def close(self) -> None:
        """Leave the group; the other ranks may continue."""
        for peer in self.peers.values():
            peer.send({"bye": True})
        self._closed.set()

    def abort(self, problem: str, remedy: str, exit_code: int = EXIT_USER_ERROR) -> None:
        """End all ranks because of an error on this one. On the main rank the caller prints it; the
        error of another rank is printed by the main rank. That rank waits meanwhile, since its exit
        would make a launcher end the main rank before it has printed the error.
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
        """Send a message with this rank's position and, on a non-main rank, the names of the
        collectives that are not reported yet.
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
                time.sleep(HEARTBEAT_INTERVAL)  # this rank may be about to raise the same error
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
        """On the main rank: end all ranks if one has entered a different collective than this rank
        under the same number. A rank that is ahead is compared once this rank gets there.
        """
        for peer in self.peers.values():
            for number, name in list(peer.names.items()):
                if self._names.get(number, name) != name:
                    self._end_mismatch(number)
                if number <= self.position.number:
                    peer.names.pop(number, None)

    def _compare_progress(self, timeout: float) -> None:
        """End all ranks if, for `timeout` seconds, one of them has not reached an all-reduce that
        others wait in, or all of them have been waiting in one.
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
        """Format a peer, or this rank, for a message."""
        rank, host = (peer.rank, peer.host) if peer else (self.rank, socket.gethostname())
        return f"rank {rank} of {self.size} (on {host})"

    def _end_lost_rank(self, peer: Peer | None, reason: str) -> None:
        self._end_process(f"lost {self._describe_peer(peer)}: {reason}", None, EXIT_RANK_LOST)

    def _end_mismatch(self, number: int = 0) -> None:
        """End all ranks with an error that lists the collective of each, at `number` if known."""
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
        """End this process and, on the main rank, all others."""
        with self._end_lock:
            if self._closed.is_set():  # already left or ending
                return
            if self.rank == 0:
                for peer in self.peers.values():
                    peer.send({"end": [None, None, exit_code]})
            # Only after sending: the listener threads then close their connections, which the other
            # ranks would notice before the message.
            self._closed.set()
            if problem:
                print_error(problem, remedy or f"the same command resumes: {resume_command()}")
            os._exit(exit_code)


def print_error(problem: str, remedy: str) -> None:
    """Print an error as the command line does, but directly to file descriptor 2: a stuck thread
    may hold the locks of sys.stderr, the progress display or the log handlers.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"mlxgpt: {problem}\n  → {remedy}\n".encode(errors="replace"))
