"""Loss curve in a terminal, in Braille dots or ASCII."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.text import Text

Y_AXIS_WIDTH = 8  # columns of the y axis


MAX_LOSS = 1e6  # nats; larger values are not plotted


def render_loss_chart(
    records: Iterable[dict[str, Any]], width: int, height: int, *, unicode: bool = True
) -> Text:
    """Render the training loss as a line and the validation loss as rings.

    Args:
        records: lines of metrics.jsonl.
        width, height: size in columns and lines, with axes.
        unicode: whether the terminal can show Braille.
    """
    train_points: list[tuple[float, float]] = []
    val_points: list[tuple[float, float]] = []
    for record in records:
        for key, points in (("loss", train_points), ("val_loss", val_points)):
            value: Any = record.get(key)
            # metrics.jsonl may be from another tool, and contain anything.
            if type(value) in (int, float) and abs(value) < MAX_LOSS:
                points.append((float(record["step"]), float(value)))
    if not train_points:
        return Text("no loss has been logged yet\n")
    train_curve = _downsample(np.array(train_points))
    val_curve = np.array(val_points).reshape(-1, 2)
    low, high = _y_limits(np.concatenate([train_curve[:, 1], val_curve[:, 1]]))
    last_step = max(train_curve[-1, 0], *val_curve[:, 0], 1.0)
    columns, rows = max(8, width - Y_AXIS_WIDTH - 1), max(2, height - 2)
    canvas = np.zeros((rows, columns), dtype=int)
    _draw_curve(canvas, train_curve[:, 0] / last_step, (high - train_curve[:, 1]) / (high - low))
    chars = [[_dots_to_char(dots, unicode) for dots in row] for row in canvas]
    for step, value in val_curve:
        row = round((high - value) / (high - low) * (rows - 1))
        if 0 <= row < rows:
            chars[row][min(columns - 1, int(step / last_step * columns))] = "○" if unicode else "o"
    return _add_axes(chars, low, high, int(last_step), unicode)


MAX_POINTS = 100  # points of the curve, each the mean of a bucket


def _downsample(points: np.ndarray) -> np.ndarray:
    buckets = np.array_split(points, min(len(points), MAX_POINTS))
    return np.array([bucket.mean(axis=0) for bucket in buckets])


def _y_limits(values: np.ndarray) -> tuple[float, float]:
    """Minimum and 97th percentile, since the first losses may be far above all others."""
    low, high = float(values.min()), float(np.quantile(values, 0.97))
    return low, high if high > low else low + 1.0


# Unicode bits of a Braille character's dots: two columns of four, top to bottom.
BRAILLE_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def _draw_curve(canvas: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Draw a line on the canvas; x and y are in 0–1, from the top left."""
    rows, columns = canvas.shape
    x_samples = np.linspace(x[0], x[-1], 2 * columns) if len(x) > 1 else x
    dot_columns = np.minimum(2 * columns - 1, (x_samples * 2 * columns).astype(int))
    dot_rows = np.rint(np.interp(x_samples, x, y) * (4 * rows - 1)).astype(int)
    previous_row = dot_rows[0]
    for dot_column, dot_row in zip(dot_columns, dot_rows, strict=True):
        for filled_row in range(min(previous_row, dot_row), max(previous_row, dot_row) + 1):
            if 0 <= filled_row < 4 * rows:
                canvas[filled_row // 4, dot_column // 2] |= BRAILLE_DOTS[
                    filled_row % 4, dot_column % 2
                ]
        previous_row = dot_row


def _dots_to_char(dots: int, unicode: bool) -> str:
    if not dots:
        return " "
    return chr(0x2800 + dots) if unicode else "*"


def _add_axes(
    chars: Sequence[Sequence[str]], low: float, high: float, last_step: int, unicode: bool
) -> Text:
    """Add axes: highest and lowest loss, first and last step."""
    bar, corner, dash = ("│", "└", "─") if unicode else ("|", "+", "-")
    chart, rows, columns = Text(), len(chars), len(chars[0])
    for n, row in enumerate(chars):
        y = high - (high - low) * n / (rows - 1)
        label = f"{y:.2f}" if n in (0, rows // 2, rows - 1) else ""
        chart.append(f"{label:>{Y_AXIS_WIDTH - 1}} {bar}", "dim")
        for char in row:
            chart.append(char, "bold yellow" if char in "○o" else "cyan")
        chart.append("\n")
    chart.append(f"{'':>{Y_AXIS_WIDTH}}{corner}{dash * columns}\n", "dim")
    marker = "○" if unicode else "o"
    legend = f"steps; line: training loss; {marker}: val loss"
    chart.append(
        f"{'':>{Y_AXIS_WIDTH + 1}}0 to {last_step:,} {legend}"[: Y_AXIS_WIDTH + 1 + columns] + "\n",
        "dim",
    )
    return chart
