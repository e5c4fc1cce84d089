"""Numbers and tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlxgpt.bench.records import Spread


def figure(number: float, digits: int = 3) -> str:
    """A positive number with that many digits that count, as 12,300 or 1.23."""
    if number <= 0:
        return f"{number:g}"
    places = digits - 1 - math.floor(math.log10(number))
    return f"{round(number, places):,.{max(0, places)}f}"


def spread_of(spread: Spread) -> str:
    """The median, in brackets the least and the most."""
    return f"{figure(spread.median)} ({figure(spread.least)} to {figure(spread.most)})"


def time_of(seconds: float) -> str:
    """Seconds, minutes or hours."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{figure(seconds / length, 2)} {unit}"
    return f"{figure(seconds, 2)} s"


def table(rows: Sequence[Sequence[str]], align: str = "<") -> list[str]:
    """A Markdown table whose first row is its head; `align` is for all columns but the first."""
    columns = []
    for n, (head, *cells) in enumerate(zip(*rows, strict=True)):
        width, side = max(3, *map(len, (head, *cells))), align if n else "<"
        rule = "-" * (width - 1) + (":" if side == ">" else "-")
        columns.append([f"{cell:{side}{width}}" for cell in (head, rule, *cells)])
    return [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]
