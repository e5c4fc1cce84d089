"""Process groups for distributed training: all-reduce, gather, broadcast and barriers.

`LocalGroup` is a single process; its collectives do nothing. `MLXGroup` is several processes,
started by `mlx.launch`: `mx.distributed` sums arrays, and the control channel (control.py) carries
everything else. Callers treat both alike. How MLX behaves: benchmarks/notes/distributed.md.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import mlx.core as mx

from mlxgpt.distributed import control, rendezvous
from mlxgpt.distributed.control import ControlChannel, Peer
from mlxgpt.distributed.launcher import is_launched
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Arrays = dict[str, mx.array]


class ProcessGroup(ABC):
    """The ranks of a training run, seen from one of them.

    Every rank must call the same collectives, with the same names, in the same order.

    Attributes:
        rank: rank of this process, from 0.
        size: number of ranks.
        hosts: host name of each rank.
    """

    def __init__(self, rank: int, size: int, hosts: Sequence[str]) -> None:
        self.rank, self.size, self.hosts = rank, size, list(hosts)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reads and writes the run folder, and prints."""
        return self.rank == 0

    def describe_rank(self, rank: int) -> str:
        """Format a rank for a message."""
        return f"rank {rank} (on {self.hosts[rank]})"

    @abstractmethod
    def average(
        self, loss: mx.array, gradients: Arrays, dtype: mx.Dtype
    ) -> tuple[mx.array, Arrays]:
        """Collective. Average a loss and gradients over all ranks, bit-identical on each. Stop
        requests are sent along with them; see `should_stop`.

        Args:
            loss: scalar [], float32.
            gradients: by name, float32.
            dtype: dtype in which gradients are sent and summed.
        """

    @abstractmethod
    def should_stop(self, stop_requested: bool) -> bool:
        """Whether training stops after this step; the same on all ranks. Not a collective.

        Args:
            stop_requested: whether this rank wants to stop. The next `average` tells the other
                ranks, so all stop one step later; a single process stops immediately.
        """

    @abstractmethod
    def sum(self, name: str, array: mx.array) -> mx.array:
        """Collective. Sum an array over all ranks, bit-identical on each."""

    @abstractmethod
    def gather(self, name: str, value: Any) -> list[Any]:
        """Collective. Gather JSON values from all ranks, in rank order, on each rank."""

    @abstractmethod
    def broadcast(self, name: str, value: Any = None) -> Any:
        """Collective. Broadcast a JSON value from the main rank to all ranks."""

    @abstractmethod
    def broadcast_arrays(self, name: str, arrays: Mapping[str, mx.array]) -> Arrays:
        """Collective. Broadcast arrays from the main rank to all ranks, bit for bit.

        Args:
            arrays: by name; the same names, shapes and dtypes (4 or 8 bytes) on every rank.
        """

    @abstractmethod
    def barrier(self, name: str) -> None:
        """Collective. Wait until all ranks have reached this barrier."""

    @abstractmethod
    def watchdog(self, step_seconds: float) -> AbstractContextManager[None]:
        """Context for the training loop: ends all ranks if one of them makes no more progress.

        Args:
            step_seconds: duration of a step.
        """

    @abstractmethod
    def local_group(self) -> LocalGroup:
        """A group with this rank and size but without communication, to time this rank's share of
        a step.
        """

    @abstractmethod
    def close(self) -> None:
        """Collective. Leave the group."""

    @abstractmethod
    def abort(self, error: UserError) -> None:
        """End all ranks because of an error on this one. The caller still raises it; if this is not
        the main rank, the main rank prints it.
        """

    @abstractmethod
    def raise_on_all_ranks(self, error: UserError | None) -> None:
        """Collective. Raise on all ranks if any of them has an error.

        Raises:
            UserError: the error of the lowest rank that has one, prefixed with that rank's name on
                the other ranks.
        """


class LocalGroup(ProcessGroup):
    """A single process: collectives return their input."""

    def __init__(self, rank: int = 0, size: int = 1, hosts: Sequence[str] = ()) -> None:
        super().__init__(rank, size, hosts or [socket.gethostname()])

    def average(
        self, loss: mx.array, gradients: Arrays, dtype: mx.Dtype
    ) -> tuple[mx.array, Arrays]:
        return loss, gradients

    def should_stop(self, stop_requested: bool) -> bool:
        return stop_requested

    def sum(self, name: str, array: mx.array) -> mx.array:
        return array

    def gather(self, name: str, value: Any) -> list[Any]:
        return [_json_round_trip(value)]

    def broadcast(self, name: str, value: Any = None) -> Any:
        return _json_round_trip(value)

    def broadcast_arrays(self, name: str, arrays: Mapping[str, mx.array]) -> Arrays:
        return dict(arrays)

    def barrier(self, name: str) -> None:
        pass

    def watchdog(self, step_seconds: float) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def local_group(self) -> LocalGroup:
        return self

    def close(self) -> None:
        pass

    def abort(self, error: UserError) -> None:
        pass

    def raise_on_all_ranks(self, error: UserError | None) -> None:
        if error:
            raise error


LOCAL_GROUP = LocalGroup()  # stateless, so it can be shared


class MLXGroup(ProcessGroup):
    """Several processes, connected by `mx.distributed` and a control channel."""

    def __init__(
        self, group: mx.distributed.Group, channel: ControlChannel, hosts: Sequence[str]
    ) -> None:
        super().__init__(group.rank(), group.size(), hosts)
        self._group, self._control = group, channel
        self._local_stop_requested = self._stop_requested = False

    def average(
        self, loss: mx.array, gradients: Arrays, dtype: mx.Dtype
    ) -> tuple[mx.array, Arrays]:
        # One packed array, since many small all-reduces take several times as long. The host waits
        # for it, since macOS kills GPU work that waits several seconds for another machine.
        packed = mx.concatenate([g.reshape(-1).astype(dtype) for g in gradients.values()])
        means = self.sum("gradients", packed).astype(mx.float32) / self.size
        ends = list(itertools.accumulate(g.size for g in gradients.values()))
        pieces = zip(gradients.items(), mx.split(means, ends[:-1]), strict=True)
        averages = {name: piece.reshape(g.shape) for (name, g), piece in pieces}
        stop_flag = mx.array(float(self._local_stop_requested))
        stop_flags, losses = self.sum("loss", mx.stack([stop_flag, loss]))
        self._stop_requested = bool(stop_flags > 0)
        return losses / self.size, averages

    def should_stop(self, stop_requested: bool) -> bool:
        self._local_stop_requested = stop_requested
        return self._stop_requested

    def sum(self, name: str, array: mx.array) -> mx.array:
        mx.eval(array)
        with self._control.all_reduce(f"{name} of {array.size:,} {array.dtype}"):
            return _all_sum(array, self._group)

    def gather(self, name: str, value: Any) -> list[Any]:
        return self._control.gather(name, value)

    def broadcast(self, name: str, value: Any = None) -> Any:
        return self._control.broadcast(name, value)

    def broadcast_arrays(self, name: str, arrays: Mapping[str, mx.array]) -> Arrays:
        words = [mx.contiguous(array).reshape(-1).view(mx.uint32) for array in arrays.values()]
        packed = mx.concatenate(words)
        with self._pause_watchdog():  # it may take far longer than a step
            total = self.sum(name, packed if self.is_main else mx.zeros_like(packed))
        ends = list(itertools.accumulate(word.size for word in words))
        pieces = zip(arrays.items(), mx.split(total, ends[:-1]), strict=True)
        return {key: piece.view(array.dtype).reshape(array.shape) for (key, array), piece in pieces}

    def barrier(self, name: str) -> None:
        self._control.barrier(name)

    @contextlib.contextmanager
    def watchdog(self, step_seconds: float) -> Iterator[None]:
        self._control.heartbeat_timeout = control.HEARTBEAT_TIMEOUT
        self._control.step_seconds = step_seconds
        try:
            yield
        finally:
            self._control.step_seconds = None

    def local_group(self) -> LocalGroup:
        return LocalGroup(self.rank, self.size, self.hosts)

    def close(self) -> None:
        self.barrier("end")
        self._control.close()

    def abort(self, error: UserError) -> None:
        self._control.abort(error.problem, error.remedy)

    def raise_on_all_ranks(self, error: UserError | None) -> None:
        own_error = [error.problem, error.remedy] if error else None
        for rank, reported in enumerate(self.gather("errors", own_error)):
            if reported and error and rank == self.rank:
                raise error
            if reported:
                problem, remedy = reported
                raise UserError(f"{self.describe_rank(rank)}: {problem}", remedy)

    @contextlib.contextmanager
    def _pause_watchdog(self) -> Iterator[None]:
        step_seconds, self._control.step_seconds = self._control.step_seconds, None
        try:
            yield
        finally:
            self._control.step_seconds = step_seconds


SECURITY_NOTE = "MLX traffic is not authenticated or encrypted; use it only on a network you trust"


@contextlib.contextmanager
def init_process_group() -> Iterator[ProcessGroup]:
    """Context that connects the processes launched together; yields a `LocalGroup` if there is only
    this one. A UserError inside ends all ranks; on normal exit each rank waits for the others.

    If a rank is lost, a thread prints an error to stderr and ends the process.

    Raises:
        UserError: if the processes cannot connect to each other.
    """
    group = _init_group()
    if group.size > 1 and group.is_main:
        logger.info(f"{group.size} ranks, on {', '.join(group.hosts)}: {SECURITY_NOTE}")
    try:
        yield group
    except UserError as error:
        group.abort(error)
        raise
    group.close()


def run_main_first(group: ProcessGroup, function: Callable[[], T]) -> T:
    """Collective. Call a function on all ranks and return its result: first on the main rank, then
    on one rank of each other machine, then on the rest. So ranks find the files that the first one
    on their machine has written.
    """
    host = group.hosts[group.rank]
    turn = 0 if group.is_main else 1 if group.hosts.index(host) == group.rank else 2
    results: list[T] = []
    for stage in range(3):
        if stage == turn:
            results.append(function())
        group.barrier(f"turn {stage + 1} of 3")
    return results[0]


def measure_all_reduce_seconds(
    group: ProcessGroup, n_values: int, dtype: mx.Dtype, repeats: int = 3
) -> float:
    """Collective. Measure the seconds of an all-reduce: the best time of the slowest rank."""
    if group.size == 1:
        return 0.0
    array = mx.zeros(n_values, dtype)
    best = float("inf")
    for _ in range(repeats):
        group.barrier("before a timed sum")
        started = time.monotonic()
        group.sum("timing", array)
        best = min(best, time.monotonic() - started)
    return max(group.gather("seconds of a sum", best))


LAUNCH_TIMEOUT = 60.0  # seconds for all processes to start


def _init_group() -> ProcessGroup:
    if not is_launched():
        return LOCAL_GROUP
    with _time_limit(LAUNCH_TIMEOUT):
        try:
            group = mx.distributed.init(strict=True)
        except RuntimeError as error:
            raise UserError(
                f"the ranks cannot connect to each other: {error}",
                "start them with mlx.launch, using addresses that all machines can reach; if "
                "another run uses the same ports, add --starting-port N.",
            ) from error
        if group.size() == 1:
            return LOCAL_GROUP
        peers = _connect(group)
    channel = ControlChannel(group.rank(), group.size(), peers)
    return MLXGroup(group, channel, channel.gather("hosts", socket.gethostname()))


ADDRESS_BYTES = 512  # size of the message with the main rank's address


def _connect(group: mx.distributed.Group) -> dict[int, Peer]:
    """Connect the control channel; returns its peers. An all-reduce sends the main address."""
    message = bytes(ADDRESS_BYTES)
    listener = None
    if group.rank() == 0:
        listener, address = rendezvous.open_listener(rendezvous.find_main_address())
        address["name"] = socket.gethostname()
        message = json.dumps(address).encode().ljust(ADDRESS_BYTES)
    total = _all_sum(mx.array(list(message), mx.uint8), group)
    address = json.loads(bytes(memoryview(total)))  # type: ignore[arg-type]
    if listener:
        return rendezvous.accept_peers(listener, group.size(), address["password"])
    return rendezvous.connect_to_main(address, group.rank())


def _all_sum(array: mx.array, group: mx.distributed.Group) -> mx.array:
    # On the CPU except with CUDA, since macOS kills GPU work that waits several seconds.
    stream = None if mx.cuda.is_available() else mx.cpu
    total = mx.distributed.all_sum(array, group=group, stream=stream)
    mx.eval(total)
    return total


def _json_round_trip(value: Any) -> Any:
    return json.loads(json.dumps(value))


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Context that ends the process after `seconds`: MLX would wait forever for missing ranks."""

    def end_process() -> None:
        control.print_error(
            f"not all ranks started within {seconds:.0f} s",
            "check the output of the other ranks; mlx.launch --verbose shows how they are started.",
        )
        os._exit(control.EXIT_RANK_LOST)

    timer = threading.Timer(seconds, end_process)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
