"""A comparison: its progress on stderr, and its results on stdout."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlxgpt.cli.progress import PreparationDisplay, duration
from mlxgpt.cli.tables import Results
from mlxgpt.experiments.report import HEAD, cells, notes
from mlxgpt.experiments.results import Record
from mlxgpt.experiments.runner import CompareCallback
from mlxgpt.training.selfcheck import Check

READABLE = 100  # columns of running text


class ComparisonDisplay(CompareCallback):
    """A live table in a terminal; elsewhere a line for each training."""

    def __init__(self) -> None:
        self._preparation = PreparationDisplay()
        self.console = self._preparation.console
        self._live: Live | None = None
        self._record: Record | None = None
        self._checked = False
        self._now = ""
        self._step, self._steps = 0, 1
        self._before = 0.0  # finished trainings
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

    def on_prepare(self, doing: str, done: int, total: int) -> None:
        self._preparation.progress(doing, done, total)

    def on_check(self, check: Check) -> None:
        """Show a failed check."""
        if not self._checked:
            self._checked = True
            line = Text("checking itself, and timing a few steps")
            self.console.print(line, soft_wrap=True)
        if check.ok is False:
            self.console.print(Text(f"self-check: {check.name}: {check.detail}", style="bold red"))

    def on_variant_begin(self, variant: str, seed: int, steps: int, done: int, total: int) -> None:
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

    def on_variant_end(self, record: Record) -> None:
        self._record = record
        self._draw()
        if not self._live and self._now:
            name = self._now.rpartition(", seed ")[0]
            result = next(result for result in record.variants if result.name == name)
            last = result.trainings[-1]
            left = self._left(done=sum(len(result.trainings) for result in record.variants))
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
    """Print the table, and the notes on how to read it."""
    to = Results(highlight=False)
    to.print(_table(record))
    for note in notes(record):
        to.print()
        to.print(Text(note, style="dim"), width=min(to.width, READABLE))


def _table(record: Record) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in HEAD:
        table.add_column(name, overflow="fold")
    for result in record.variants:
        style = {"better": "bold green", "worse": "red"}.get(result.verdict, "")
        table.add_row(*map(escape, cells(result)), style=style)
    return table
