"""A loss curve in a terminal: dots of Braille, or plain letters where those cannot be shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.text import Text

MARGIN = 8  # columns of the y axis
LARGEST = 1e6  # loss that is believed
# Of a character's dots, two columns of four, from the top: Unicode's own order.
DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
SMOOTH = 100  # parts of the curve: each point is the mean of one of them


def loss_chart(
    records: Iterable[dict[str, Any]], width: int, height: int, *, unicode: bool = True
) -> Text:
    """The loss in training as a line, that on held-out text as rings.

    Args:
        records: of metrics.jsonl.
        width, height: columns and lines, axes included.
        unicode: whether the terminal shows Braille.
    """
    training: list[tuple[float, float]] = []
    held_out: list[tuple[float, float]] = []
    for record in records:
        for key, points in (("loss", training), ("val_loss", held_out)):
            value: Any = record.get(key)
            if type(value) in (int, float) and abs(value) < LARGEST:  # a stranger's may be anything
                points.append((float(record["step"]), float(value)))
    if not training:
        return Text("no loss was logged yet\n")
    line = _means(np.array(training))
    rings = np.array(held_out).reshape(-1, 2)
    low, high = _range(np.concatenate([line[:, 1], rings[:, 1]]))
    last = max(line[-1, 0], *rings[:, 0], 1.0) if len(rings) else max(line[-1, 0], 1.0)
    columns, rows = max(8, width - MARGIN - 1), max(2, height - 2)
    canvas = np.zeros((rows, columns), dtype=int)
    _draw(canvas, line[:, 0] / last, (high - line[:, 1]) / (high - low))
    letters = [[_letter(dots, unicode) for dots in row] for row in canvas]
    for step, value in rings:
        row = round((high - value) / (high - low) * (rows - 1))
        if 0 <= row < rows:
            letters[row][min(columns - 1, int(step / last * columns))] = "○" if unicode else "o"
    return _framed(letters, low, high, int(last), unicode)


def _means(points: np.ndarray) -> np.ndarray:
    parts = np.array_split(points, min(len(points), SMOOTH))
    return np.array([part.mean(axis=0) for part in parts])


def _range(values: np.ndarray) -> tuple[float, float]:
    """From the least to nearly the greatest: a first loss may stand far above all the rest."""
    low, high = float(values.min()), float(np.quantile(values, 0.97))
    return low, high if high > low else low + 1.0


def _draw(canvas: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """A line on it; x and y from 0, left and top, to 1."""
    rows, columns = canvas.shape
    fine = np.linspace(x[0], x[-1], 2 * columns) if len(x) > 1 else x
    places = np.minimum(2 * columns - 1, (fine * 2 * columns).astype(int))
    heights = np.rint(np.interp(fine, x, y) * (4 * rows - 1)).astype(int)
    before = heights[0]
    for place, height in zip(places, heights, strict=True):
        for dot in range(min(before, height), max(before, height) + 1):
            if 0 <= dot < 4 * rows:
                canvas[dot // 4, place // 2] |= DOTS[dot % 4, place % 2]
        before = height


def _letter(dots: int, unicode: bool) -> str:
    if not dots:
        return " "
    return chr(0x2800 + dots) if unicode else "*"


def _framed(
    letters: Sequence[Sequence[str]], low: float, high: float, last: int, unicode: bool
) -> Text:
    """With its axes: the highest and the lowest loss, the first step and the last."""
    bar, corner, dash = ("│", "└", "─") if unicode else ("|", "+", "-")
    chart, rows, columns = Text(), len(letters), len(letters[0])
    for n, row in enumerate(letters):
        at = high - (high - low) * n / (rows - 1)
        told = f"{at:.2f}" if n in (0, rows // 2, rows - 1) else ""
        chart.append(f"{told:>{MARGIN - 1}} {bar}", "dim")
        for letter in row:
            chart.append(letter, "bold yellow" if letter in "○o" else "cyan")
        chart.append("\n")
    chart.append(f"{'':>{MARGIN}}{corner}{dash * columns}\n", "dim")
    ring = "○" if unicode else "o"
    legend = f"steps; the line: loss in training; {ring}: on held-out text"
    chart.append(f"{'':>{MARGIN + 1}}0 to {last:,} {legend}"[: MARGIN + 1 + columns] + "\n", "dim")
    return chart
