"""Ctrl-C during training: the first one stops after the step and saves, the second one quits."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlxgpt.backend import device_errors

logger = logging.getLogger(__name__)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) asks training to stop after its step; the second one quits at
    once. Yields a function that returns whether it was asked.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        # In another thread: this one may hold a handler's lock.
        line = "stopping after this step, and saving; once more quits at once"
        threading.Thread(target=logger.info, args=(line,)).start()

    for number in signals:
        signal.signal(number, handle)
    try:
        yield asked.is_set
    except RuntimeError as error:
        if asked.is_set() and device_errors.classify(error):
            raise KeyboardInterrupt from error  # instead of a retry
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
