"""Two CPU threads that each compute half of a batch in parallel.

MLX runs the operations of a stream on one thread, so that the other core is idle except during
large matrix products. Therefore each of two threads gets half of a batch and half of the BLAS
threads. The number of threads does not depend on the number of cores, so that it does not affect
the bits of a run.

An unevaluated array belongs to its thread, and a compiled function to the thread that traced it.
Each thread therefore has its own function, and only evaluated arrays are passed between threads.
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

MAX_CHUNK_TOKENS = 1024  # smaller chunks are slower, larger ones take more memory


def cpu_chunks_per_thread(rows: int, length: int) -> int:
    """Number of equal chunks into which each thread splits its half of a batch: the fewest with at
    most MAX_CHUNK_TOKENS each. A chunk reuses the previous one's memory, so that a large batch
    takes hardly more memory than a small one.
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
    """Run the second of two calls on the second thread, while the caller makes the first one.
    Yields a future of the evaluated result, to be awaited inside the context.

    Args:
        function: the function of the second call.
        calls: the arguments of both calls.
    """
    # The first eval computes the arrays. The second one detaches their completion events, for which
    # two threads that share an array would race and crash.
    mx.eval(calls)
    mx.eval(calls)
    with blas.share_blas_threads(THREADS):
        yield _get_worker().submit(functools.partial(_call_and_eval, function, calls[1]))


def _call_and_eval(function: Callable[..., ResultT], arguments: tuple) -> ResultT:
    result = function(*arguments)
    mx.eval(result)
    return result


class _Worker:
    """A thread that calls submitted functions one after another until the program ends.

    Not an executor, whose threads cannot run code when they end: each thread must clear its MLX
    streams last, or the process may abort at exit.
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
