"""CPU only: the two halves of a batch, or of an update, each computed by a thread of its own.

MLX runs a stream's operations on one thread, so that of two CPU cores one waits wherever there is
no large matrix product. So half a batch goes to each of two threads, with half of BLAS's threads
each (what that saves: benchmarks/tier1-linux-2-cores.md). There are two lanes on every CPU,
whatever its number of cores, so that a run gives the same bits. On a GPU there is one lane, this
thread.

An array that is not computed yet belongs to its thread, and a compiled function to the thread that
traced it. So each lane has its own function, and only computed arrays go in and out.
"""

from __future__ import annotations

import atexit
import functools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

import mlx.core as mx

from mlxgpt.backend.cpu import blas
from mlxgpt.machine.device import on_cpu

Result = TypeVar("Result")

PORTION = 1024  # tokens: with fewer a step takes longer, with more it takes more memory


def count() -> int:
    """How many lanes there are here."""
    return 2 if on_cpu() else 1


def portions(sequences: int, length: int) -> int:
    """In how many equal portions, one after the other, each lane takes its half of a batch: as few
    as have no more than `PORTION` tokens. So a large batch takes hardly more memory than a small
    one, and what one portion frees serves the next.
    """
    if not on_cpu() or sequences % 2:
        return 1
    half = sequences // 2
    few = (n for n in range(1, half) if half % n == 0 and half // n * length <= PORTION)
    return next(few, half)


class Lanes(Generic[Result]):
    """One function, made by `make` once for each lane."""

    def __init__(self, make: Callable[[], Callable[..., Result]]) -> None:
        self._first = make()
        self._second = make() if count() == 2 else None

    def __call__(self, shares: Iterable[tuple]) -> list[Result]:
        """The function's results for one or two sets of arguments; computed, if there are two
        lanes.
        """
        first, *others = shares
        if self._second is None or not others:
            return [self._first(*share) for share in (first, *others)]
        # Twice: once computes; once more takes the event off each array that says when it is
        # computed. Two threads that share an array would race for it, and crash.
        mx.eval(first, others)
        mx.eval(first, others)
        with blas.shared_by(2):
            theirs = _other_thread().start(functools.partial(_computed, self._second, *others))
            mine = _computed(self._first, first)
            return [mine, theirs.result()]


def _computed(function: Callable[..., Result], share: tuple) -> Result:
    result = function(*share)
    mx.eval(result)
    return result


class _Thread:
    """Calls functions one after the other until the program ends.

    Not an executor, because MLX wants each thread to clear its streams as the last thing it does
    (or the process may abort when it ends), and an executor's threads cannot be told to.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable, Future] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mlxgpt-lane", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def start(self, function: Callable[[], Result]) -> Future[Result]:
        future: Future[Result] = Future()
        self._calls.put((function, future))
        return future

    def _run(self) -> None:
        while call := self._calls.get():
            function, future = call
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del call, function, future  # they hold arrays
        mx.clear_streams()

    def _end(self) -> None:
        self._calls.put(None)
        self._thread.join()


@functools.cache
def _other_thread() -> _Thread:
    return _Thread()
