"""The log handler of the command line: prints the records of the logger `mlxgpt` on stderr.

As a library, mlxgpt installs no handler. Rich is imported when the first line is printed, so that
`--help` stays fast.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from mlxgpt.distributed.launcher import get_rank

if TYPE_CHECKING:
    from rich.console import Console

PACKAGE_LOGGER = logging.getLogger("mlxgpt")
WARNING_STYLE = "bold yellow"


class ConsoleHandler(logging.Handler):
    """Prints log records on stderr; warnings in bold yellow.

    Attributes:
        console: shared with the progress displays, so that lines are printed above a live display.
    """

    @cached_property
    def console(self) -> Console:
        return _new_console()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record. Failing writes to stderr are ignored by streams.py."""
        from rich.text import Text

        style = WARNING_STYLE if record.levelno >= logging.WARNING else ""
        self.console.print(Text(record.getMessage(), style=style), soft_wrap=True)


@contextmanager
def logging_to_console() -> Iterator[None]:
    """Context manager that prints log records from INFO up; on non-main ranks errors only."""
    handler = ConsoleHandler(logging.INFO if get_rank() == 0 else logging.ERROR)
    level = PACKAGE_LOGGER.level
    PACKAGE_LOGGER.addHandler(handler)
    PACKAGE_LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        PACKAGE_LOGGER.removeHandler(handler)
        PACKAGE_LOGGER.setLevel(level)


def stderr_console() -> Console:
    """The console of the installed handler; a new one if none is installed."""
    for handler in PACKAGE_LOGGER.handlers:
        if isinstance(handler, ConsoleHandler):
            return handler.console
    return _new_console()


@contextmanager
def deduplicate_logs() -> Iterator[dict[str, logging.LogRecord]]:
    """Context manager that prints each log line only once. Yields the records printed so far, by
    line; clear it to start over.
    """
    records_by_message: dict[str, logging.LogRecord] = {}

    def is_new_message(record: logging.LogRecord) -> bool:
        return records_by_message.setdefault(record.getMessage(), record) is record

    handlers = list(PACKAGE_LOGGER.handlers)
    for handler in handlers:
        handler.addFilter(is_new_message)
    try:
        yield records_by_message
    finally:
        for handler in handlers:
            handler.removeFilter(is_new_message)


def _new_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)
