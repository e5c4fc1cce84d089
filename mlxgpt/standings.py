"""A comparison as it goes on, on stderr; and what came of it, on stdout."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlxgpt.display import PreparationDisplay, duration
from mlxgpt.reports.comparison import HEAD, cells, notes
from mlxgpt.results import Results
from mlxgpt.study.compare import Observer
from mlxgpt.study.record import Record
from mlxgpt.training.selfcheck import Check

READABLE = 100  # columns of running text


class ComparisonDisplay(Observer):
    """A live table in a terminal; elsewhere a line for each training."""

    def __init__(self) -> None:
        self._preparation = PreparationDisplay()
        self.console = self._preparation.console
        self._live: Live | None = None
        self._record: Record | None = None
        self._checked = False
        self._now = ""
        self._step, self._steps = 0, 1
        self._before = 0.0  # trainings that are there
        self._total = 1
        self._began: float | None = None
        self._began_with = 0.0

    def __enter__(self) -> ComparisonDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._preparation.close()
        if self._live:
            self._live.stop()
            self._live = None

    def on_note(self, line: str) -> None:
        self._preparation.note(line)

    def on_warning(self, line: str) -> None:
        self._preparation.note(line)

    def on_prepare(self, doing: str, done: int, total: int) -> None:
        self._preparation.progress(doing, done, total)

    def on_check(self, check: Check) -> None:
        """Shown where it failed."""
        if not self._checked:
            self._checked = True
            self.on_note("checking itself, and timing a few steps")
        if check.ok is False:
            self.console.print(Text(f"self-check: {check.name}: {check.detail}", style="bold red"))

    def on_training(self, variant: str, seed: int, steps: int, done: int, total: int) -> None:
        self._preparation.close()
        self._now, self._steps, self._step = f"{variant}, seed {seed}", steps, 0
        self._before, self._total = done, total
        if self._began is None:
            self._began, self._began_with = time.monotonic(), done
        if self.console.is_terminal and not self._live:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        self._draw()

    def on_log(self, record: dict[str, Any]) -> None:
        self._step = record["step"]
        self._draw()

    def on_standing(self, record: Record) -> None:
        self._record = record
        self._draw()
        if not self._live and self._now:
            name = self._now.rpartition(", seed ")[0]
            standing = next(s for s in record.variants if s.name == name)
            last = standing.trainings[-1]
            left = self._left(done=sum(len(s.trainings) for s in record.variants))
            line = f"{self._now}  bits per byte {last.bits_per_byte:.4f}{left}"
            self.console.print(Text(line), soft_wrap=True)
        self._now = ""

    def _draw(self) -> None:
        if not self._live:
            return
        parts: list[Any] = [_table(self._record), Text()] if self._record else []
        if self._now:
            done = self._before + self._step / self._steps
            bar = Table.grid(expand=True)
            bar.add_row(ProgressBar(total=self._total, completed=done))
            line = f"{self._now}  step {self._step:,}/{self._steps:,}{self._left(done)}"
            parts += [bar, Text(line)]
        self._live.update(Group(*parts), refresh=True)

    def _left(self, done: float) -> str:
        """How much is done, and how long the rest will take, if no seeds are added."""
        text = f"  {int(done)} of {self._total} trainings"
        if self._began is None or done <= self._began_with:
            return text
        each = (time.monotonic() - self._began) / (done - self._began_with)
        return f"{text}, about {duration(each * max(0.0, self._total - done))} left"


def show_comparison(record: Record) -> None:
    """The table, and what has to be known to read it."""
    to = Results(highlight=False)
    to.print(_table(record))
    for note in notes(record):
        to.print()
        to.print(Text(note, style="dim"), width=min(to.width, READABLE))


def _table(record: Record) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in HEAD:
        table.add_column(name, overflow="fold")
    for standing in record.variants:
        style = {"better": "bold green", "worse": "red"}.get(standing.verdict, "")
        table.add_row(*map(escape, cells(standing)), style=style)
    return table
