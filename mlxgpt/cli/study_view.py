"""Progress of a comparison or scaling study on stderr, and its results on stdout."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlxgpt.cli.progress import PreparationDisplay, format_duration
from mlxgpt.cli.tables import StdoutConsole
from mlxgpt.experiments.report import COMPARISON_COLUMNS, format_notes, format_variant_row
from mlxgpt.experiments.results import ComparisonRecord
from mlxgpt.experiments.runner import CompareCallback
from mlxgpt.experiments.scaling import ScaleCallback
from mlxgpt.experiments.scaling_report import (
    ADVICE_COLUMNS,
    RESULT_COLUMNS,
    format_advice_notes,
    format_advice_row,
    format_result_row,
    format_scaling_notes,
)
from mlxgpt.experiments.scaling_results import LengthResult, ScalingRecord
from mlxgpt.training.selfcheck import CheckResult


class StudyDisplay(CompareCallback, ScaleCallback):
    """A live table in a terminal; otherwise one line per training run."""

    def __init__(self) -> None:
        self._preparation = PreparationDisplay()
        self.console = self._preparation.console
        self._live: Live | None = None
        self._table: Table | None = None
        self._has_checked = False
        self._current_label, self._seed = "", 0
        self._step, self._steps = 0, 1
        self._finished_count = 0.0  # finished training runs
        self._total = 1
        self._start_time: float | None = None
        self._count_at_start = 0.0

    def __enter__(self) -> StudyDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._preparation.close()
        if self._live:
            self._live.stop()
            self._live = None

    def on_prepare(self, stage: str, done: int, total: int) -> None:
        self._preparation.show_progress(stage, done, total)

    def on_check(self, check: CheckResult) -> None:
        """Show a failed check."""
        if not self._has_checked:
            self._has_checked = True
            line = Text("running self-checks and timing a few steps")
            self.console.print(line, soft_wrap=True)
        if check.ok is False:
            self.console.print(Text(f"self-check: {check.name}: {check.detail}", style="bold red"))

    def on_variant_begin(self, variant: str, seed: int, steps: int, done: int, total: int) -> None:
        self._preparation.close()
        self._current_label, self._seed = f"{variant}, seed {seed}", seed
        self._steps, self._step = steps, 0
        self._finished_count, self._total = done, total
        if self._start_time is None:
            self._start_time, self._count_at_start = time.monotonic(), done
        if self.console.is_terminal and not self._live:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        self._draw()

    def on_log(self, record: dict[str, Any]) -> None:
        self._step = record["step"]
        self._draw()

    def on_variant_end(self, record: ComparisonRecord) -> None:
        self._table = _build_table(record)
        name = self._current_label.rpartition(", seed ")[0]
        losses = [r.trainings[-1].bits_per_byte for r in record.variants if r.name == name]
        self._show_result(
            self._current_label, losses, sum(len(r.trainings) for r in record.variants)
        )

    def on_result(self, result: LengthResult) -> None:
        if self._current_label:  # otherwise the run was reused
            label = f"{result.name}, seed {self._seed}"
            self._show_result(label, result.losses[-1:], int(self._finished_count) + 1)

    def _show_result(self, label: str, losses: Sequence[float], done: int) -> None:
        """Show the loss of the run that ended, none if it was reused."""
        self._draw()
        if losses and not self._live:
            score = f"bits per byte {losses[0]:.4f}"
            line = f"{label}  {score}{self._format_progress(done)}"
            self.console.print(Text(line), soft_wrap=True)
        self._current_label = ""

    def _draw(self) -> None:
        if not self._live:
            return
        renderables: list[Any] = [self._table, Text()] if self._table else []
        if self._current_label:
            done = self._finished_count + self._step / self._steps
            bar = Table.grid(expand=True)
            bar.add_row(ProgressBar(total=self._total, completed=done))
            progress = self._format_progress(done)
            line = f"{self._current_label}  step {self._step:,}/{self._steps:,}{progress}"
            renderables += [bar, Text(line)]
        self._live.update(Group(*renderables), refresh=True)

    def _format_progress(self, done: float) -> str:
        """How many runs are done, and the time left if no seeds are added."""
        text = f"  {int(done)} of {self._total} runs"
        if self._start_time is None or done <= self._count_at_start:
            return text
        elapsed = time.monotonic() - self._start_time
        remaining = elapsed / (done - self._count_at_start) * max(0.0, self._total - done)
        return f"{text}, about {format_duration(remaining)} left"


MAX_NOTE_WIDTH = 100  # columns; longer lines of text are wrapped


def show_comparison(record: ComparisonRecord) -> None:
    """Print the results table, with notes on how to read it."""
    console = StdoutConsole(highlight=False)
    console.print(_build_table(record))
    _print_notes(console, format_notes(record))


def show_scaling(record: ScalingRecord) -> None:
    """Print the results, the law, its test, and the best sizes."""
    console = StdoutConsole(highlight=False)
    rows = [format_result_row(record, result) for result in record.results]
    console.print(_make_table(RESULT_COLUMNS, rows))
    _print_notes(console, format_scaling_notes(record))
    if record.advice:
        console.print()
        rows = [format_advice_row(advice) for advice in record.advice]
        console.print(_make_table(ADVICE_COLUMNS, rows))
        _print_notes(console, format_advice_notes(record))


def _print_notes(console: StdoutConsole, notes: Sequence[str]) -> None:
    for note in notes:
        console.print()
        console.print(Text(note, style="dim"), width=min(console.width, MAX_NOTE_WIDTH))


def _build_table(record: ComparisonRecord) -> Table:
    styles = {"better": "bold green", "worse": "red"}
    row_styles = [styles.get(result.verdict, "") for result in record.variants]
    return _make_table(COMPARISON_COLUMNS, map(format_variant_row, record.variants), row_styles)


def _make_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], row_styles: Sequence[str] = ()
) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row, style in itertools.zip_longest(rows, row_styles, fillvalue=""):
        table.add_row(*map(escape, row), style=style)
    return table
