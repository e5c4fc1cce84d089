"""One thread in which all of MLX's work is done, and which everybody shares by turns: a token of
this text, a token of that one.
"""

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
MOST = 32  # that wait for their turns
AHEAD = 16  # items that are made before their consumer takes them
_END = object()


class Busy(Exception):
    """Too many ask at once."""


class _Task:
    """Something under way: the worker takes its items, and hands them over."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._items: Iterator[Any] | None = None
        self._made, self._ended = 0, False
        self.given: asyncio.Queue[tuple[Any, BaseException | None]] = asyncio.Queue()
        self.taken = 0
        self.unwanted = False

    def take_turn(self) -> bool:
        """Make an item; whether there may be another one. In the worker's thread alone, as arrays
        belong to the thread that made them.
        """
        if self._ended:
            return False
        try:
            if self.unwanted:
                return self._close()
            if self._items is None:
                self._items = self._make()
            item = next(self._items, _END)
            self._ended = item is _END
            self._give(item, None)
        except BaseException as error:
            self._ended = True
            failure = device_errors.classify(error)
            self._give(None, failure.to_user_error() if failure else error)
        self._made += 1
        return not self._ended and self._made - self.taken < AHEAD

    def _close(self) -> bool:
        self._ended = True
        if self._items is not None and hasattr(self._items, "close"):
            self._items.close()
        return False

    def _give(self, item: Any, error: BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self.given.put_nowait, (item, error))


class Device:
    """The thread, and those who wait for it."""

    def __init__(self) -> None:
        self._new: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._waiting = 0
        threading.Thread(target=self._work, name="device", daemon=True).start()

    def _work(self) -> None:
        turns: deque[_Task] = deque()
        while True:
            while not turns or not self._new.empty():
                task = self._new.get()
                if task not in turns:
                    turns.append(task)
            task = turns.popleft()
            if task.take_turn():
                turns.append(task)

    async def items(self, make: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
        """What an iterator gives, made and advanced in the thread. It stops with its consumer. A
        consumer that pauses does not count as waiting, and gets no more turns.

        Raises:
            Busy: if too many wait.
        """
        if self._waiting >= MOST:
            raise Busy
        task = _Task(make)
        try:
            while True:
                self._new.put(task)  # also to wake it where it was far enough ahead
                self._waiting += 1
                try:
                    item, error = await task.given.get()
                finally:
                    self._waiting -= 1
                task.taken += 1
                if error is not None:
                    raise error
                if item is _END:
                    return
                yield item
        finally:
            task.unwanted = True
            self._new.put(task)

    async def begun(
        self, make: Callable[[], Iterator[Any]]
    ) -> tuple[Any, AsyncGenerator[Any, None]]:
        """The first item, so that what cannot begin is refused as a whole; and those after it."""
        items = self.items(make)
        try:
            return await anext(items), items
        except BaseException:
            await items.aclose()
            raise

    async def call(self, function: Callable[[], T]) -> T:
        """A function's result; see `items`."""
        async with contextlib.aclosing(self.items(lambda: iter([function()]))) as items:
            async for item in items:
                return item
        raise AssertionError  # it gives one
