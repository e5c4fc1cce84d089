"""Format numbers and tables for Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlxgpt.bench.records import SummaryStats


def format_number(number: float, digits: int = 3) -> str:
    """Format a positive number with `digits` significant digits, such as 12,300 or 1.23."""
    if number <= 0:
        return f"{number:g}"
    decimals = digits - 1 - math.floor(math.log10(number))
    return f"{round(number, decimals):,.{max(0, decimals)}f}"


def format_stats(stats: SummaryStats) -> str:
    """Format as "median (minimum to maximum)"."""
    return (
        f"{format_number(stats.median)} ({format_number(stats.least)} to "
        f"{format_number(stats.most)})"
    )


def format_seconds(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    for unit, unit_seconds in (("h", 3600), ("min", 60)):
        if seconds >= unit_seconds:
            return f"{format_number(seconds / unit_seconds, 2)} {unit}"
    return f"{format_number(seconds, 2)} s"


def render_markdown_table(rows: Sequence[Sequence[str]], align: str = "<") -> list[str]:
    """Render a Markdown table from a header and rows; `align` is for all but the first column."""
    columns = []
    for n, (head, *cells) in enumerate(zip(*rows, strict=True)):
        width, alignment = max(3, *map(len, (head, *cells))), align if n else "<"
        separator = "-" * (width - 1) + (":" if alignment == ">" else "-")
        columns.append([f"{cell:{alignment}{width}}" for cell in (head, separator, *cells)])
    return [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]
