"""What came of a command, drawn in a terminal: always on stdout, and nothing else there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from mlxgpt.chart import loss_chart
from mlxgpt.evaluation.appraisal import Appraisal
from mlxgpt.evaluation.quality import METRICS
from mlxgpt.storage.run import Run
from mlxgpt.training.selfcheck import Check

READABLE = 80  # columns of running text
CURVE = 20  # lines of a loss curve
MARKS = {True: Text("ok", "green"), False: Text("FAILED", "bold red"), None: Text("told", "dim")}


class Results(Console):
    """The console on stdout; where nobody reads on (`| head -1`), the command ends."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show_checks(checks: Sequence[Check]) -> None:
    """The self-check as a table on stdout, with the reasons under it."""
    to = Results(highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("", "checked", "found"):
        table.add_column(column, style="dim" if column == "checked" else "")
    for check in checks:
        table.add_row(MARKS[check.ok], check.name, escape(check.detail))
    to.print(table)
    for check in checks:
        if check.why:
            to.print()
            to.print(Text(check.why))


def show_curve(run: Run) -> None:
    """A run's loss, as far as it came, on stdout."""
    to = Results(highlight=False)
    to.print(Text(run.name, style="bold"))
    width, unicode = min(to.width, 100), not to.options.ascii_only
    to.print(loss_chart(run.metrics(), width, CURVE, unicode=unicode), end="", soft_wrap=True)


def show_appraisal(appraisal: Appraisal) -> None:
    """What generated texts are worth, as a table on stdout."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for name in appraisal.columns:
        table.add_column(name, justify="right", style="bold" if name == "model" else "")
    table.add_column("better", style="dim")
    for metric in METRICS:
        values = [column[metric.name] for column in appraisal.columns.values()]
        if all(value is None for value in values):
            continue
        table.add_row(metric.name, *(_metric(v, metric.share) for v in values), metric.better)
    to = Results(highlight=False)
    to.print(table)
    if appraisal.order_preference is not None:
        to.print(
            f"\nfinds a real story likelier than its sentences in another order: "
            f"{appraisal.order_preference:.0%} (chance: 50 %)",
            soft_wrap=True,
        )
    missing = [column["grammar errors per 100 words"] for column in appraisal.columns.values()]
    if None in missing:
        to.print(
            Text("\ngrammar errors are not counted; for them: pip install 'harper-py>=0.2,<0.3'")
        )


def _metric(value: float | None, share: bool) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if share else f"{value:.2f}"


def show_texts(texts: Sequence[str]) -> None:
    """Generated texts on stdout: in a terminal as columns to read, elsewhere as they are."""
    to = Results(highlight=False, soft_wrap=False)
    for number, text in enumerate(texts, 1):
        if not to.is_terminal:
            print(f"--- {number}\n{text}\n")
            continue
        to.print(Rule(Text(f"{number} of {len(texts)}", style="dim"), align="left", style="dim"))
        to.print(Padding(Text(text.strip("\n")), (0, 0, 1, 2)), width=min(to.width, READABLE))


def show_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same keys, as a table on stdout."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*[escape(str(value)) for value in row.values()])
    Results(highlight=False).print(table)
