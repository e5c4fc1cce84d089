"""A second CPU thread, which computes half of a batch at the same time as the first one.

MLX runs the operations of a stream on one thread, so that one of two cores waits wherever there is
no large matrix product. Therefore each of two threads gets half of a batch, and half of BLAS's
threads. The number of threads does not depend on the number of cores, so that a run has the
same bits everywhere.

An array that is not evaluated yet belongs to its thread, and a compiled function to the thread that
traced it. Each thread therefore has its own function, and only evaluated arrays go in and out.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

import mlx.core as mx

from mlxgpt.backend.cpu import blas

ResultT = TypeVar("ResultT")

THREADS = 2

MAX_CHUNK_TOKENS = 1024  # with fewer a step takes longer, with more it takes more memory


def cpu_chunks_per_thread(rows: int, length: int) -> int:
    """Number of equal chunks in which each thread computes its half of a batch, one after the
    other: the fewest with at most MAX_CHUNK_TOKENS each. A large batch then takes hardly more
    memory than a small one, because each chunk reuses the memory of the one before.
    """
    if rows % THREADS:
        return 1
    half = rows // THREADS
    chunk_counts = (
        n for n in range(1, half) if half % n == 0 and half // n * length <= MAX_CHUNK_TOKENS
    )
    return next(chunk_counts, half)


@contextlib.contextmanager
def run_on_second_thread(
    function: Callable[..., ResultT], calls: Sequence[tuple]
) -> Iterator[Future[ResultT]]:
    """Make the second of two calls on the second thread, while this one makes the first. Yields a
    future of its evaluated result, to be waited for inside.

    Args:
        function: the function of the second call.
        calls: the arguments of both calls.
    """
    # The first call evaluates. The second one detaches from each array the event that says when it
    # is evaluated: two threads that share an array would race for it, and crash.
    mx.eval(calls)
    mx.eval(calls)
    with blas.share_blas_threads(THREADS):
        yield _get_worker().submit(functools.partial(_call_and_eval, function, calls[1]))


def _call_and_eval(function: Callable[..., ResultT], arguments: tuple) -> ResultT:
    result = function(*arguments)
    mx.eval(result)
    return result


class _Worker:
    """A thread that calls functions one after another until the program ends.

    Not an executor: MLX wants each thread to clear its streams as the last thing it does, or the
    process may abort at its end, and an executor's threads cannot be told to.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable, Future] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mlxgpt-worker", daemon=True)
        self._thread.start()
        atexit.register(self._shutdown)

    def submit(self, function: Callable[[], ResultT]) -> Future[ResultT]:
        future: Future[ResultT] = Future()
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

    def _shutdown(self) -> None:
        self._calls.put(None)
        self._thread.join()


@functools.cache
def _get_worker() -> _Worker:
    return _Worker()
