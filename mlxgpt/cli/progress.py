"""Progress of data preparation, and of what is counted, on stderr."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.filesize import decimal
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from mlxgpt.backend import device
from mlxgpt.cli.console import stderr_console

PLAIN_LINE_INTERVAL = 10.0  # seconds between progress lines without a terminal
PROGRESS_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TextColumn("memory {task.fields[memory]}"),
    TimeRemainingColumn(),
)


class PreparationDisplay:
    """Progress of data preparation: a bar in a terminal, otherwise a line every 10 s."""

    def __init__(self) -> None:
        self.console = stderr_console()
        self._live: Live | Progress | None = None
        self._bar: Progress | None = None
        self._stage = ""
        self._last_shown = time.monotonic()

    def show_progress(self, stage: str, done: int, total: int) -> None:
        """Show `done` of about `total` bytes."""
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            self._bar = Progress(
                *PROGRESS_COLUMNS, console=self.console, transient=True, get_time=time.monotonic
            )
            self._bar.add_task(stage, completed=done, total=total, memory="")
            self._stage, self._last_shown = stage, now
        interval = 0.2 if self.console.is_terminal else PLAIN_LINE_INTERVAL
        if not self._bar or now - self._last_shown < interval:
            return
        self._last_shown = now
        (task,) = self._bar.tasks
        memory = decimal(device.resident_bytes())
        self._bar.update(task.id, completed=done, total=max(done, total), memory=memory)
        if not self.console.is_terminal:
            columns = (c for c in PROGRESS_COLUMNS if not isinstance(c, BarColumn))
            cells = (column.render(task) for column in columns)
            line = "  ".join(str(text) for text in cells)
            self.console.print(Text(line), soft_wrap=True)
        elif not self._live:
            self._live = self._bar
            self._live.start()

    def close(self) -> None:
        """Restore the terminal; also after an error."""
        if self._live:
            self._live.stop()
            self._live = None


class CountingDisplay:
    """Progress by count: a bar in a terminal, otherwise a line every 10 s.

    Args:
        unit: what is counted, such as `examples`.
    """

    def __init__(self, unit: str) -> None:
        self.console = stderr_console()
        self._unit = unit
        self._last_line = time.monotonic()
        columns = TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._task = self._bar.add_task(unit)

    def __enter__(self) -> CountingDisplay:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def show_progress(self, done: int, total: int) -> None:
        """Show `done` of `total`."""
        self._bar.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line > PLAIN_LINE_INTERVAL:
            self._last_line = now
            self.console.print(f"{done:,} of {total:,} {self._unit}")


def format_duration(seconds: float) -> str:
    """Format seconds as h:mm:ss, preceded by days if there are any."""
    return str(timedelta(seconds=round(seconds)))
