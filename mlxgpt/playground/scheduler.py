"""Worker thread for all MLX work; concurrent requests take turns, one token each."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, TypeVar

from mlxgpt.backend import device_errors

T = TypeVar("T")
_END = object()


class TooManyRequestsError(Exception):
    """More than MAX_WAITING requests are waiting for the worker."""


MAX_PREFETCH = 16  # items that a task may produce ahead of its consumer


class _Task:
    """A request's iterator: the worker thread advances it, the event loop consumes its items."""

    def __init__(self, make_iterator: Callable[[], Iterator[Any]]) -> None:
        self._make_iterator = make_iterator
        self._loop = asyncio.get_running_loop()
        self._iterator: Iterator[Any] | None = None
        self._produced, self._finished = 0, False
        self.results: asyncio.Queue[tuple[Any, BaseException | None]] = asyncio.Queue()
        self.consumed = 0
        self.cancelled = False

    def advance(self) -> bool:
        """Produce one item and return whether to produce another now.

        Only runs in the worker's thread, since MLX arrays belong to the thread that created them.
        """
        if self._finished:
            return False
        try:
            if self.cancelled:
                return self._close()
            if self._iterator is None:
                self._iterator = self._make_iterator()
            item = next(self._iterator, _END)
            self._finished = item is _END
            self._send_result(item, None)
        except BaseException as error:
            self._finished = True
            failure = device_errors.classify_device_error(error)
            self._send_result(None, failure.to_user_error() if failure else error)
        self._produced += 1
        return not self._finished and self._produced - self.consumed < MAX_PREFETCH

    def _close(self) -> bool:
        self._finished = True
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()
        return False

    def _send_result(self, item: Any, error: BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the server has stopped
            self._loop.call_soon_threadsafe(self.results.put_nowait, (item, error))


MAX_WAITING = 32  # requests waiting for an item


class DeviceWorker:
    """Worker thread with a queue of tasks."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._waiting_count = 0
        threading.Thread(target=self._run, name="device", daemon=True).start()

    def _run(self) -> None:
        runnable: deque[_Task] = deque()
        while True:
            while not runnable or not self._queue.empty():
                task = self._queue.get()
                if task not in runnable:
                    runnable.append(task)
            task = runnable.popleft()
            if task.advance():
                runnable.append(task)

    async def stream(self, make_iterator: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
        """Yield the items of an iterator that is created and advanced in the worker's thread.

        The iterator is closed when its consumer stops. While a consumer pauses, it does not count
        as waiting and gets no more turns.

        Raises:
            TooManyRequestsError: if MAX_WAITING requests are already waiting.
        """
        if self._waiting_count >= MAX_WAITING:
            raise TooManyRequestsError
        task = _Task(make_iterator)
        try:
            while True:
                self._queue.put(task)  # also resumes a task that paused MAX_PREFETCH items ahead
                self._waiting_count += 1
                try:
                    item, error = await task.results.get()
                finally:
                    self._waiting_count -= 1
                task.consumed += 1
                if error is not None:
                    raise error
                if item is _END:
                    return
                yield item
        finally:
            task.cancelled = True
            self._queue.put(task)

    async def start_stream(
        self, make_iterator: Callable[[], Iterator[Any]]
    ) -> tuple[Any, AsyncGenerator[Any, None]]:
        """Return the first item and a stream of the rest; raise errors that come before it."""
        stream = self.stream(make_iterator)
        try:
            return await anext(stream), stream
        except BaseException:
            await stream.aclose()
            raise

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function in the worker's thread and return its result; raises as `stream` does."""
        async with contextlib.aclosing(self.stream(lambda: iter([function()]))) as results:
            async for result in results:
                return result
        raise AssertionError  # unreachable: the stream has one item
