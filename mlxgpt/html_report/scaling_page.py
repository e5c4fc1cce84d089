"""HTML report of a scaling study: losses over tokens and parameters, the law, the best sizes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from mlxgpt.experiments.scaling_report import render_scaling
from mlxgpt.experiments.scaling_results import LengthResult, ScalingRecord
from mlxgpt.html_report import plots
from mlxgpt.html_report.page import Figure, Page
from mlxgpt.html_report.plots import Line

CURVE_POINTS = 40


def build_scaling_page(record: ScalingRecord) -> Page:
    """Build the page for one scaling study."""
    page = Page(f"Scaling: {record.name}")
    if all(result.losses for result in record.results):
        page.add_heading("Loss over tokens")
        page.add_figure(_plot_over_tokens(record))
        page.add_heading("Loss over parameters")
        page.add_figure(_plot_over_parameters(record))
    page.add_markdown(render_scaling(record))
    return page


def _plot_over_tokens(record: ScalingRecord) -> Figure:
    """A line for each size; its points are the lengths."""
    sizes = list(dict.fromkeys(result.size for result in record.results))
    lines = []
    for group, size in enumerate(sizes):
        results = [result for result in record.results if result.size == size]
        lines.append(_mean_line(size.name, [r.tokens / 1e6 for r in results], results, group))
        if record.fit:
            tokens = np.geomspace(record.fitted[0].tokens, record.test.tokens, CURVE_POINTS)
            law = [record.fit.law.predict(size.parameters, n) for n in tokens]
            lines.append(Line("", tokens / 1e6, np.array(law), group=group))
    return _make_figure(lines, "million tokens", _make_caption(record))


def _plot_over_parameters(record: ScalingRecord) -> Figure:
    """A line for each length; its points are the sizes."""
    lengths = sorted({result.tokens for result in record.fitted})
    lines = []
    for group, tokens in enumerate(lengths):
        results = [result for result in record.results if result.tokens == tokens]
        name = f"{tokens / 1e6:.2g}M tokens"
        lines.append(_mean_line(name, [r.size.parameters / 1e6 for r in results], results, group))
        if record.fit:
            bounds = record.fitted[0].size.parameters, record.test.size.parameters
            parameters = np.geomspace(*bounds, CURVE_POINTS)
            law = [record.fit.law.predict(n, tokens) for n in parameters]
            lines.append(Line("", parameters / 1e6, np.array(law), group=group))
    return _make_figure(lines, "million parameters", _make_caption(record))


def _make_caption(record: ScalingRecord) -> str:
    caption = "Mean over seeds; the band spans minimum to maximum."
    if not record.fit:
        return caption
    law = "Lines without markers: the law, which is not fitted to the largest size,"
    return f"{caption} {law} {record.test.size.name}."


def _mean_line(name: str, x: Sequence[float], results: Sequence[LengthResult], group: int) -> Line:
    return Line(
        name,
        np.array(x),
        np.array([statistics.fmean(result.losses) for result in results]),
        low=np.array([min(result.losses) for result in results]),
        high=np.array([max(result.losses) for result in results]),
        markers=True,
        group=group,
    )


def _make_figure(lines: Sequence[Line], axis: str, caption: str) -> Figure:
    svg = plots.plot_lines(lines, axis, "bits per byte", name=axis)
    measured = [line for line in lines if line.markers]
    summary = "; ".join(
        f"{line.name}: {', '.join(f'{y:.3f}' for y in line.y)}" for line in measured
    )
    return Figure(svg, caption, f"Bits per byte by {axis}: {summary}")
