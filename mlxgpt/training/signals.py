"""Ctrl-C during training: the first one saves and stops after the step, the second one quits."""

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
def catch_stop_signals() -> Iterator[Callable[[], bool]]:
    """Context in which the first Ctrl-C (or SIGTERM) requests a stop after the current step, and
    the second one quits immediately. Yields a function that returns whether a stop was requested.
    """
    stop_requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested.is_set
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    old_handlers = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, frame: Any) -> None:
        if stop_requested.is_set():
            raise KeyboardInterrupt
        stop_requested.set()
        # In another thread, since this one may hold a log handler's lock.
        message = "saving and stopping after this step; press Ctrl-C again to quit immediately"
        threading.Thread(target=logger.info, args=(message,)).start()

    for number in signals:
        signal.signal(number, handle)
    try:
        yield stop_requested.is_set
    except RuntimeError as error:
        if stop_requested.is_set() and device_errors.classify_device_error(error):
            raise KeyboardInterrupt from error  # instead of a retry
        raise
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
