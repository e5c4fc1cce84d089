"""Numbers and tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlxgpt.bench.records import SummaryStats


def format_number(number: float, digits: int = 3) -> str:
    """A positive number rounded to `digits` significant digits, as 12,300 or 1.23."""
    if number <= 0:
        return f"{number:g}"
    decimals = digits - 1 - math.floor(math.log10(number))
    return f"{round(number, decimals):,.{max(0, decimals)}f}"


def format_stats(stats: SummaryStats) -> str:
    """The median, in brackets the least and the most."""
    return (
        f"{format_number(stats.median)} ({format_number(stats.least)} to "
        f"{format_number(stats.most)})"
    )


def format_seconds(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    for unit, unit_seconds in (("h", 3600), ("min", 60)):
        if seconds >= unit_seconds:
            return f"{format_number(seconds / unit_seconds, 2)} {unit}"
    return f"{format_number(seconds, 2)} s"


def render_markdown_table(rows: Sequence[Sequence[str]], align: str = "<") -> list[str]:
    """A Markdown table whose first row is its head; `align` is for all columns but the first."""
    columns = []
    for n, (head, *cells) in enumerate(zip(*rows, strict=True)):
        width, alignment = max(3, *map(len, (head, *cells))), align if n else "<"
        separator = "-" * (width - 1) + (":" if alignment == ">" else "-")
        columns.append([f"{cell:{alignment}{width}}" for cell in (head, separator, *cells)])
    return [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]
