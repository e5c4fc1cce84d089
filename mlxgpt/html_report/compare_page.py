"""HTML report of a comparison: learning curves, differences with intervals, verdicts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlxgpt.experiments import report
from mlxgpt.experiments.curves import LearningCurve
from mlxgpt.experiments.results import ComparisonRecord, VariantResult
from mlxgpt.html_report import plots
from mlxgpt.html_report.page import Figure, Page
from mlxgpt.html_report.plots import Line


def build_comparison_page(record: ComparisonRecord) -> Page:
    """Build the page for one comparison."""
    page = Page(f"Comparison: {record.name}")
    _add_forest_plot(page, record)
    _add_loss_curves(page, record)
    page.add_markdown(report.render_comparison(record))
    return page


def _add_forest_plot(page: Page, record: ComparisonRecord) -> None:
    baseline, *variants = record.variants
    rows = [
        (variant.name, variant.difference.mean, variant.difference.low, variant.difference.high)
        for variant in variants
        if variant.difference
    ]
    if not rows:
        return
    page.add_heading(f"Difference from {baseline.name}")
    label = "difference in bits per byte (negative is better)"
    svg = plots.plot_intervals(rows, label, name="differences")
    summary = "; ".join(
        f"{variant.name}: {variant.difference.mean:+.4f}, {variant.verdict}"
        for variant in variants
        if variant.difference
    )
    caption = (
        f"Mean difference over seeds with its {100 * (1 - record.level):.4g}% confidence interval. "
        "An interval that contains 0 is inconclusive."
    )
    page.add_figure(Figure(svg, caption, f"Differences from {baseline.name}: {summary}"))


MAX_LINES = 5  # baseline and best variants; plots.py has five colors, dashes and markers
CURVE_X_AXES: dict[str, Callable[[LearningCurve], list[float]]] = {
    "million tokens": lambda curve: [tokens / 1e6 for tokens in curve.tokens],
    "minutes": lambda curve: [seconds / 60 for seconds in curve.seconds],
}


def _add_loss_curves(page: Page, record: ComparisonRecord) -> None:
    baseline, *variants = record.variants
    ranked = sorted(filter(_has_curve, variants), key=_mean_bits_or_inf)
    plotted = list(filter(_has_curve, (baseline, *ranked[: MAX_LINES - 1])))
    if not plotted:
        return
    page.add_heading("Learning curves")
    omitted = len(record.variants) - len(plotted)
    omitted_note = f" The table lists {omitted} more variants." if omitted else ""
    caption = f"Mean over seeds; the band spans minimum to maximum.{omitted_note}"
    figures = {}
    for axis, get_x in CURVE_X_AXES.items():
        series = [_mean_line(result, get_x) for result in plotted]
        svg = plots.plot_lines(series, axis, "bits per byte", name=f"curves, {axis}")
        summary = "; ".join(
            f"{line.name}: from {line.y[0]:.3f} to {line.y[-1]:.3f}"
            for line in series
            if len(line.y)
        )
        figures[axis] = Figure(svg, caption, f"Bits per byte by {axis}: {summary}")
    page.add_figure_tabs("x axis", figures)


def _has_curve(result: VariantResult) -> bool:
    return any(run.curve for run in result.trainings)


def _mean_bits_or_inf(result: VariantResult) -> float:
    return np.inf if result.mean_bits_per_byte is None else result.mean_bits_per_byte


def _mean_line(result: VariantResult, get_x: Callable[[LearningCurve], list[float]]) -> Line:
    """Average a variant's curves over its seeds, up to the end of the shortest."""
    curves = [run.curve for run in result.trainings if run.curve]
    length = min(len(curve.steps) for curve in curves)
    values = np.array([curve.bits_per_byte[:length] for curve in curves], dtype=float)
    x = np.mean([get_x(curve)[:length] for curve in curves], axis=0)
    return Line(result.name, x, values.mean(0), low=values.min(0), high=values.max(0), markers=True)
