"""Deliver a Ctrl-C that Python would drop."""

from __future__ import annotations

import _thread
import sys
import threading
from typing import Any


def redeliver_interrupt(unraisable: Any) -> None:
    """Hook for exceptions that Python can only print, such as in a weak reference's callback: a
    Ctrl-C there would be lost, so it interrupts the main thread again, after the callback.
    """
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)
