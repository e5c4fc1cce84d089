"""Several machines, or processes, at one training: which of them this is, and what all have.

`mlx.launch` starts the same command on each; MLX's own engine (`mx.distributed`) moves arrays
between them, and channel.py the rest. What is found out about the engine stands in
benchmarks/distributed.md.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlxgpt.distributed import control as channel
from mlxgpt.distributed.control import Channel, Tell
from mlxgpt.distributed.launcher import addresses, launched
from mlxgpt.errors import UserError

PLACE = 512  # bytes that tell where the first rank listens
MEET = 60.0  # seconds for all to be there


class Ranks:
    """All ranks, as one of them sees them.

    Attributes:
        rank: this one's number, from 0; size: of how many.
        hosts: their machines' names.
        wish: whether this one wishes to stop; it is told with the next step's gradients.
        stopped: whether one of them wished so at the last step; the same on all.
    """

    def __init__(self, group: mx.distributed.Group, line: Channel, hosts: Sequence[str]) -> None:
        self._group, self._channel = group, line
        self.rank, self.size, self.hosts = group.rank(), group.size(), list(hosts)
        self.wish = self.stopped = False

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and shows things."""
        return self.rank == 0

    def alone(self) -> Ranks:
        """The same one, which adds up nothing: to see how long its own share takes."""
        return _Alone(self._group, self._channel, self.hosts)

    def name(self, rank: int) -> str:
        """A rank in words."""
        return f"rank {rank} (on {self.hosts[rank]})"

    def sum(self, array: mx.array) -> mx.array:
        """The sum of an array over all ranks, computed, with the same bits on each."""
        mx.eval(array)
        begun, _ = self._channel.at
        self._channel.at = begun + 1, begun
        total = _all_sum(array, self._group)
        self._channel.at = begun + 1, begun + 1
        return total

    def stops(self, wish: bool) -> bool:
        """Whether all stop after this step, as one of them wished before it; `wish` is told with
        the next one.
        """
        self.wish = wish
        return self.stopped

    def gather(self, tree: Any) -> list[Any]:
        """What each rank says, as JSON, on all of them."""
        return self._channel.gather(tree)

    def spread(self, tree: Any = None) -> Any:
        """What the first rank says, as JSON, on all of them."""
        return self._channel.spread(tree)

    def meet(self) -> None:
        """Wait until all have come here."""
        self._channel.gather(None)

    def spread_arrays(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The first rank's arrays, bit by bit, on all of them, which have such of their own."""
        words = [mx.contiguous(own).reshape(-1).view(mx.uint32) for own in arrays.values()]
        sent = mx.concatenate(words)
        slowest, self._channel.slowest = self._channel.slowest, None  # it may take far longer
        total = self.sum(sent if self.first else mx.zeros_like(sent))
        self._channel.slowest = slowest
        ends = list(itertools.accumulate(word.size for word in words))
        pieces = zip(arrays.items(), mx.split(total, ends[:-1]), strict=True)
        return {name: piece.view(own.dtype).reshape(own.shape) for (name, own), piece in pieces}

    @contextlib.contextmanager
    def watched(self, step_seconds: float) -> Iterator[None]:
        """While steps are taken that take about so long: a rank that takes none is noticed."""
        self._channel.patience = channel.SILENCE
        self._channel.slowest = step_seconds
        try:
            yield
        finally:
            self._channel.slowest = None

    def close(self) -> None:
        """Leave the others."""
        self._channel.close()

    def refuse(self, error: UserError) -> None:
        """End this one for a cause that a user can mend; the first rank tells it."""
        self._channel.refuse(error.problem, error.remedy)


class _Alone(Ranks):
    def sum(self, array: mx.array) -> mx.array:
        mx.eval(array)
        return array


def join(tell: Tell) -> Ranks | None:
    """Meet the others that were launched with this process; None where it is alone.

    Args:
        tell: is told, from another thread, why this process ends right after: another one is gone.

    Raises:
        UserError: if they do not find each other.
    """
    if not launched():
        return None
    with _for_at_most(MEET, tell):
        try:
            group = mx.distributed.init(strict=True)
        except RuntimeError as error:
            raise UserError(
                f"the machines do not find each other: {error}",
                "start them with mlx.launch, each with an address that the others reach; another "
                "training on the same ports: --starting-port N.",
            ) from error
        if group.size() == 1:
            return None
        peers = _connected(group)
    line = Channel(group.rank(), group.size(), peers, tell)
    return Ranks(group, line, line.gather(socket.gethostname()))


def _connected(group: mx.distributed.Group) -> dict[int, channel.Peer]:
    first = group.rank() == 0
    listener, place = channel.listen(_address()) if first else (None, {})
    place |= {"name": socket.gethostname()} if first else {}
    text = json.dumps(place).encode().ljust(PLACE) if first else bytes(PLACE)
    total = _all_sum(mx.array(list(text), mx.uint8), group)
    place = json.loads(bytes(memoryview(total)))  # type: ignore[arg-type]
    if listener:
        return channel.accept(listener, group.size(), place["password"])
    return channel.connect(place, group.rank())


def _all_sum(array: mx.array, group: mx.distributed.Group) -> mx.array:
    # On the CPU, where it can be, since macOS ends a GPU's work that waits for some seconds.
    stream = None if mx.cuda.is_available() else mx.cpu
    total = mx.distributed.all_sum(array, group=group, stream=stream)
    mx.eval(total)
    return total


def _address() -> str:
    """The first rank's own, as the launcher has it."""
    if known := addresses():
        return known[0]
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        return coordinator.rpartition(":")[0]
    return os.environ.get("NCCL_HOST_IP") or _own_address()


def _own_address() -> str:
    """This machine's address, by its name or, where that has none, by the route to others. On
    macOS the name often has none.
    """
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.connect(("192.0.2.1", 9))  # for documentation only (RFC 5737); sends nothing
        return str(udp.getsockname()[0])
    return "127.0.0.1"


@contextlib.contextmanager
def _for_at_most(seconds: float, tell: Tell) -> Iterator[None]:
    """End the process where the others do not come: the engine would wait for ever."""

    def end() -> None:
        tell(
            f"not all ranks were there after {seconds:.0f} s",
            "look at what the others said; mlx.launch --verbose tells how they were started.",
        )
        os._exit(channel.LOST)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def sum_seconds(ranks: Ranks, numbers: int, dtype: mx.Dtype, times: int = 3) -> float:
    """Seconds that a sum of so many numbers takes at best, all ranks having begun together."""
    array = mx.zeros(numbers, dtype)
    best = float("inf")
    for _ in range(times):
        ranks.meet()
        began = time.monotonic()
        ranks.sum(array)
        best = min(best, time.monotonic() - began)
    return max(ranks.gather(best))
