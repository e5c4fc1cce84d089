"""A comparison as a page: its curves with bands, its differences with intervals, the verdicts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlxgpt.experiments import report
from mlxgpt.experiments.curves import Curve
from mlxgpt.experiments.results import Record, VariantResult
from mlxgpt.html_report import plots
from mlxgpt.html_report.page import Figure, Page
from mlxgpt.html_report.plots import Line

MOST_LINES = 5  # that a plot tells apart: the first variant, and the best of the others
AXES: dict[str, Callable[[Curve], list[float]]] = {
    "million tokens": lambda curve: [tokens / 1e6 for tokens in curve.tokens],
    "minutes": lambda curve: [seconds / 60 for seconds in curve.seconds],
}


def page_of(record: Record) -> Page:
    """A page on one comparison."""
    page = Page(f"Comparison: {record.name}")
    _forest(page, record)
    _curves(page, record)
    page.markdown(report.markdown(record))
    return page


def _forest(page: Page, record: Record) -> None:
    first, *others = record.variants
    rows = [
        (s.name, s.difference.mean, s.difference.low, s.difference.high)
        for s in others
        if s.difference
    ]
    if not rows:
        return
    page.heading(f"How far from {first.name}")
    label = "difference in bits per byte; to the left is better"
    svg = plots.intervals(rows, label, name="differences")
    told = "; ".join(
        f"{s.name}: {s.difference.mean:+.4f}, {s.verdict}" for s in others if s.difference
    )
    caption = (
        "Each variant's mean difference over its seeds, and the interval that holds the true one "
        f"in {1 - record.level:.4g} of cases; an interval that holds 0 decides nothing."
    )
    page.figure(Figure(svg, caption, f"Differences from {first.name}: {told}"))


def _curves(page: Page, record: Record) -> None:
    first, *others = record.variants
    trained = [s for s in others if any(t.curve for t in s.trainings)]
    best = sorted(trained, key=lambda s: s.mean if s.mean is not None else np.inf)
    chosen = [s for s in (first, *best[: MOST_LINES - 1]) if any(t.curve for t in s.trainings)]
    if not chosen:
        return
    page.heading("Curves")
    figures = {}
    for axis, places in AXES.items():
        drawn = [_line(result, places) for result in chosen]
        svg = plots.lines(drawn, axis, "bits per byte", name=f"curves, {axis}")
        left_out = len(record.variants) - len(chosen)
        rest = f" Of {left_out} more variants the table tells." if left_out else ""
        caption = f"The mean over the seeds, in a band from the least to the greatest.{rest}"
        told = "; ".join(
            f"{line.name}: from {line.y[0]:.3f} to {line.y[-1]:.3f}"
            for line in drawn
            if len(line.y)
        )
        figures[axis] = Figure(svg, caption, f"Bits per byte by {axis}: {told}")
    page.choice("Over", figures)


def _line(result: VariantResult, places: Callable[[Curve], list[float]]) -> Line:
    """A variant's mean over its seeds, as far as all of them came."""
    curves = [t.curve for t in result.trainings if t.curve]
    length = min(len(curve.steps) for curve in curves)
    values = np.array([curve.bits_per_byte[:length] for curve in curves], dtype=float)
    x = np.mean([places(curve)[:length] for curve in curves], axis=0)
    return Line(result.name, x, values.mean(0), low=values.min(0), high=values.max(0), markers=True)
