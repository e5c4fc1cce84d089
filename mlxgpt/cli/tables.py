"""Prints results of commands as text and tables on stdout."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from mlxgpt.cli.loss_plot import render_loss_chart
from mlxgpt.config import toml
from mlxgpt.evaluation.hellaswag import HellaSwagResult
from mlxgpt.evaluation.loss import Evaluation
from mlxgpt.evaluation.sample_quality import SampleQuality
from mlxgpt.evaluation.text_metrics import METRICS
from mlxgpt.storage.info import ConfigInfo, RunSummary
from mlxgpt.storage.run import Run
from mlxgpt.training.selfcheck import CheckResult


class StdoutConsole(Console):
    """Console on stdout that ends the command if its reader closes it (`| head -1`)."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


CHECK_MARKS = {
    True: Text("ok", "green"),
    False: Text("FAILED", "bold red"),
    None: Text("info", "dim"),
}


def show_checks(checks: Sequence[CheckResult]) -> None:
    """Print the self-check as a table, with explanations below."""
    console = StdoutConsole(highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("", "check", "result"):
        table.add_column(column, style="dim" if column == "check" else "")
    for check in checks:
        table.add_row(CHECK_MARKS[check.ok], check.name, escape(check.detail))
    console.print(table)
    for check in checks:
        if check.why:
            console.print()
            console.print(Text(check.why))


CURVE_HEIGHT = 20  # lines


def show_curve(run: Run) -> None:
    """Print a run's loss curve."""
    console = StdoutConsole(highlight=False)
    console.print(Text(run.name, style="bold"))
    width, unicode = min(console.width, 100), not console.options.ascii_only
    console.print(
        render_loss_chart(run.metrics(), width, CURVE_HEIGHT, unicode=unicode),
        end="",
        soft_wrap=True,
    )


def show_appraisal(appraisal: SampleQuality) -> None:
    """Print sample quality metrics as a table."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for name in appraisal.columns:
        table.add_column(name, justify="right", style="bold" if name == "model" else "")
    table.add_column("better", style="dim")
    for metric in METRICS:
        values = [column[metric.name] for column in appraisal.columns.values()]
        if all(value is None for value in values):
            continue
        table.add_row(
            metric.name, *(_format_metric(v, metric.is_fraction) for v in values), metric.better
        )
    console = StdoutConsole(highlight=False)
    console.print(table)
    if appraisal.order_preference is not None:
        console.print(
            f"\nprefers a real story to its shuffled sentences: "
            f"{appraisal.order_preference:.0%} (chance: 50%)",
            soft_wrap=True,
        )
    grammar_errors = [
        column["grammar errors per 100 words"] for column in appraisal.columns.values()
    ]
    if None in grammar_errors:
        console.print(
            Text("\ngrammar errors were not counted; install: pip install 'harper-py>=0.2,<0.3'"),
            soft_wrap=True,
        )


def _format_metric(value: float | None, share: bool) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if share else f"{value:.2f}"


MAX_TEXT_WIDTH = 80  # columns; longer lines of text are wrapped


def show_texts(texts: Sequence[str]) -> None:
    """Print generated texts: wrapped in a terminal, otherwise unchanged."""
    console = StdoutConsole(highlight=False, soft_wrap=False)
    for number, text in enumerate(texts, 1):
        if not console.is_terminal:
            print(f"--- {number}\n{text}\n")
            continue
        console.print(
            Rule(Text(f"{number} of {len(texts)}", style="dim"), align="left", style="dim")
        )
        console.print(
            Padding(Text(text.strip("\n")), (0, 0, 1, 2)), width=min(console.width, MAX_TEXT_WIDTH)
        )


def show_evaluation(result: Evaluation) -> None:
    """Print a model's loss on a text."""
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"perplexity     {result.perplexity:.2f}")
    print(f"tokens         {result.tokens:,}")


def show_hellaswag(result: HellaSwagResult) -> None:
    """Print a model's HellaSwag accuracy, with its standard error."""
    print(f"accuracy        {result.accuracy:.4f} ± {result.accuracy_error:.4f}")
    print(f"accuracy, norm  {result.accuracy_norm:.4f} ± {result.accuracy_norm_error:.4f}")
    truncated = f", {result.cut:,} truncated to the block size" if result.cut else ""
    print(f"examples        {result.examples:,}{truncated}")


def show_info(info: ConfigInfo) -> None:
    """Print the parameters, cost and settings of a config or a run."""
    print(f"{info.name}\n")
    for part, count in info.parameters.items():
        print(f"  {part:34}{count:>14,} parameters")
    print(f"\n  training compute per token        {info.flops_per_token:>14,} FLOPs")
    print(f"  training tokens                   {info.training_tokens:>14,} tokens")
    print(f"  weights, gradients, optimizer     {decimal(info.memory_bytes):>14}")
    if info.step is not None:
        print(f"  trained                           {info.step:>14,} steps")
    if info.val_loss is not None:
        print(f"  best validation loss              {info.val_loss:>14.4f} {info.config.loss_unit}")
    print("\n" + toml.config_to_toml(info.config))


def show_runs(summaries: Sequence[RunSummary]) -> None:
    """Print the list of runs as a table."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("run", "steps", "val loss", "parameters", "data"):
        table.add_column(name, overflow="fold")
    for summary in summaries:
        cells = (
            summary.name,
            f"{summary.step:,}/{summary.steps:,}" if summary.steps else "imported",
            "–" if summary.val_loss is None else f"{summary.val_loss:.4f}",
            f"{summary.parameters:,}",
            summary.data,
        )
        table.add_row(*map(escape, cells))
    StdoutConsole(highlight=False).print(table)
