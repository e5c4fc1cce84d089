"""Capture the lines that mlxgpt logs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _LineHandler(logging.Handler):
    """Passes each logged line to a function."""

    def __init__(self, write: Callable[[str], object]) -> None:
        super().__init__(logging.INFO)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(record.getMessage())


@contextmanager
def capture_log_lines(write: Callable[[str], object]) -> Iterator[None]:
    """Pass each line that mlxgpt logs at INFO or above to a function within this context."""
    logger, handler = logging.getLogger("mlxgpt"), _LineHandler(write)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
