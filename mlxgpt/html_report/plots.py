"""Plots as SVG, drawn by matplotlib and colored by the page's CSS (light and dark).

Lines also differ in dashes and markers. Text stays text, in the browser's font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxgpt.html_report.language import translate
from mlxgpt.html_report.page import replace_unprintable
from mlxgpt.utils.errors import UserError

# Placeholders that `_clean_svg` replaces with the page's CSS variables.
TEXT_COLOR, MUTED_COLOR, GRID_COLOR = "#010101", "#020202", "#030303"
LINE_COLORS = ("#040401", "#040402", "#040403", "#040404", "#040405")


@dataclass(frozen=True)
class Line:
    """Line of a plot.

    Attributes:
        name: label in the legend.
        x, y: points; long series are downsampled.
        raw: y before smoothing, drawn faintly behind the line.
        low, high: bounds of a band around the line.
        markers: whether to mark each point.
        group: lines of the same group have the same color; default: each has its own color.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    raw: np.ndarray | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    markers: bool = False
    group: int | None = None


HEIGHT_INCHES = 2.8


def plot_lines(
    series: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    name: str,
    events: Sequence[tuple[float, str]] = (),
    half_width: bool = False,
) -> str:
    """Draw a line plot as SVG.

    Args:
        name: name of the figure, unique on its page.
        events: (x, label) of vertical lines.
        half_width: whether the plot takes half the page's width.
    """

    def draw(axes: Any) -> None:
        for n, line in enumerate(series):
            _draw_line(axes, line, n)
        for x, label in events:
            axes.axvline(x, color=MUTED_COLOR, linewidth=0.8, linestyle=(0, (1, 2)))
            transform = axes.get_xaxis_transform()
            place = {"rotation": 90, "va": "top", "ha": "right", "transform": transform}
            axes.text(x, 0.98, f"{translate(label)} ", color=MUTED_COLOR, fontsize=6.5, **place)
        axes.set_xlabel(replace_unprintable(translate(x_label)))
        axes.set_ylabel(replace_unprintable(translate(y_label)))
        _clip_y_axis(axes, series)
        if len(series) > 1:
            _add_legend(axes)

    return _render_svg(draw, name, HEIGHT_INCHES, half_width=half_width)


DASHES = ("-", (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (1.5, 1.5)), (0, (9, 2, 1, 2, 1, 2)))
MARKERS = ("o", "s", "^", "D", "v")


def _draw_line(axes: Any, line: Line, index: int) -> None:
    color_index = index if line.group is None else line.group
    color, dash = LINE_COLORS[color_index % len(LINE_COLORS)], DASHES[index % len(DASHES)]
    if line.raw is not None:
        axes.plot(*downsample_min_max(line.x, line.raw), color=color, linewidth=0.6, alpha=0.35)
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
    marker = MARKERS[color_index % len(MARKERS)] if line.markers or len(line.x) == 1 else None
    axes.plot(
        *downsample_min_max(line.x, line.y),
        color=color,
        linestyle=dash,
        marker=marker,
        markersize=4,
        linewidth=1.5,
        label=_shorten_label(translate(line.name)),
    )


def _add_legend(axes: Any) -> None:
    axes.legend(frameon=False, handlelength=4, loc="best", fontsize=7.5)


MAX_LABEL_CHARS = 40


def _shorten_label(text: str) -> str:
    """Shorten a label to MAX_LABEL_CHARS.

    A zero-width space precedes a leading underscore: matplotlib would hide it from the legend.
    """
    text = text if len(text) <= MAX_LABEL_CHARS else f"{text[: MAX_LABEL_CHARS - 1]}…"
    text = replace_unprintable(text)
    return f"\u200b{text}" if text.startswith("_") else text


def _clip_y_axis(axes: Any, series: Sequence[Line]) -> None:
    """Clip outliers far above all other values, such as the first losses."""
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in series] or [np.zeros(0)])
    if len(values) < 20:
        return
    low, q98 = values.min(), np.quantile(values, 0.98)
    if q98 > low and values.max() > q98 + (q98 - low):
        axes.set_ylim(low - 0.05 * (q98 - low), q98 + 0.25 * (q98 - low))


def plot_intervals(
    rows: Sequence[tuple[str, float, float | None, float | None]], x_label: str, *, name: str
) -> str:
    """Draw a forest plot as SVG: values with intervals, and a line at 0.

    Args:
        rows: (name, value, low, high).
        name: name of the figure, unique on its page.
    """

    def draw(axes: Any) -> None:
        for n, (_, value, low, high) in enumerate(rows):
            if low is not None and high is not None:
                axes.plot([low, high], [-n, -n], color=TEXT_COLOR, linewidth=1.4)
            axes.plot([value], [-n], color=TEXT_COLOR, marker="o", markersize=4.5)
        axes.axvline(0.0, color=MUTED_COLOR, linewidth=1, linestyle=(0, (4, 2)))
        _label_rows(axes, [row[0] for row in rows], x_label)

    return _render_svg(draw, name, 0.6 + 0.2 * len(rows))


def plot_points(rows: Sequence[tuple[str, float, bool]], x_label: str, *, name: str) -> str:
    """Draw a dot plot as SVG, with a logarithmic axis.

    Args:
        rows: (name, value, whether it was measured); measured values are filled, others hollow.
        name: name of the figure, unique on its page.
    """

    def draw(axes: Any) -> None:
        for n, (_, value, measured) in enumerate(rows):
            face_color = LINE_COLORS[1] if measured else "none"
            axes.plot(
                [value], [-n], "o", markersize=5.5, color=LINE_COLORS[1], markerfacecolor=face_color
            )
        _label_rows(axes, [row[0] for row in rows], x_label)
        axes.grid(visible=True, axis="y", linestyle=(0, (1, 3)))
        _set_log_x_axis(axes)

    return _render_svg(draw, name, 0.6 + 0.2 * len(rows))


def _label_rows(axes: Any, names: Sequence[str], x_label: str) -> None:
    axes.set_yticks(
        [-n for n in range(len(names))], [_shorten_label(name) for name in names], fontsize=7.5
    )
    axes.set_ylim(0.6 - len(names), 0.6)
    axes.set_xlabel(replace_unprintable(translate(x_label)), fontsize=7.5)
    axes.grid(visible=False, axis="y")


def _set_log_x_axis(axes: Any) -> None:
    """Make the x axis logarithmic, with plain numbers as tick labels."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    low, high = axes.xaxis.get_view_interval()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def moving_average(y: np.ndarray, window: int) -> np.ndarray:
    """Centered moving average over `window` points, fewer at the ends; NaNs are skipped.

    A trailing average would lag behind.
    """
    is_finite = np.isfinite(y)
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(v)]) for v in (np.where(is_finite, y, 0), is_finite)
    )
    index = np.arange(len(y))
    half = np.minimum(np.minimum(index, len(y) - 1 - index), window // 2)
    low, high = index - half, index + half + 1
    count = counts[high] - counts[low]
    means = np.divide(sums[high] - sums[low], count, out=np.full(len(y), np.nan), where=count > 0)
    return np.where(is_finite, means, np.nan)


MAX_LINE_POINTS = 600  # about one per pixel column


def downsample_min_max(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Downsample to the minimum and maximum of each chunk, which preserves peaks; drops NaNs."""
    is_finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[is_finite], y[is_finite]
    if len(x) <= MAX_LINE_POINTS:
        return x, y
    indices = {0, len(x) - 1}
    for chunk in np.array_split(np.arange(len(x)), MAX_LINE_POINTS // 2):
        indices |= {int(chunk[y[chunk].argmin()]), int(chunk[y[chunk].argmax()])}
    sorted_indices = sorted(indices)
    return x[sorted_indices], y[sorted_indices]


WIDE_INCHES, NARROW_INCHES = 5.8, 4.0  # narrow: for phones and half-width plots
RC_PARAMS: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": TEXT_COLOR,
    "text.parse_math": False,  # a run may be called $x$
    "axes.edgecolor": GRID_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "xtick.color": GRID_COLOR,
    "ytick.color": GRID_COLOR,
    "xtick.labelcolor": TEXT_COLOR,
    "ytick.labelcolor": TEXT_COLOR,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": GRID_COLOR,
    "axes.grid": True,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 6),
}


def _render_svg(
    draw: Callable[[Any], None], name: str, height: float, *, half_width: bool = False
) -> str:
    """Render a plot as two SVGs, wide and narrow; the page's CSS shows the one that fits.

    With `half_width`, as one narrow SVG.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "plots need matplotlib, which is not installed",
            "install it: pip install 'matplotlib>=3.9,<4'.",
        ) from None
    svgs = []
    wide_and_narrow = {"wide": WIDE_INCHES, "narrow": NARROW_INCHES}
    widths = {"half": NARROW_INCHES} if half_width else wide_and_narrow
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    for css_class, width in widths.items():
        # The salt makes ids reproducible and unique on the page.
        rc_params: Any = RC_PARAMS | {"svg.hashsalt": f"{name}, {css_class}"}
        with matplotlib.rc_context(rc_params), warnings.catch_warnings():
            # Browsers draw the text, so glyphs missing in matplotlib's font do not matter.
            warnings.filterwarnings("ignore", "Glyph .* missing")
            figure = Figure(figsize=(width, 0.75 * height if half_width else height))
            figure.set_layout_engine("constrained")
            draw(figure.subplots())
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata=no_metadata)
        svgs.append(_clean_svg(buffer.getvalue(), css_class))
    return "".join(svgs)


CSS_VARIABLES = {
    TEXT_COLOR: "var(--ink)",
    MUTED_COLOR: "var(--faint)",
    GRID_COLOR: "var(--rule)",
} | {color: f"var(--line-{n})" for n, color in enumerate(LINE_COLORS, 1)}


def _clean_svg(svg: str, css_class: str) -> str:
    """Adapt matplotlib's SVG to the page: width, font and colors."""
    svg = svg[svg.index("<svg ") :].strip()
    size = r'^<svg ([^>]*?)width="[^"]*" height="[^"]*"'
    svg = re.sub(size, rf'<svg class="{css_class}" \1', svg)
    svg = re.sub(r"(font: [\d.]+px|font-family:) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    for color, css_variable in CSS_VARIABLES.items():
        svg = svg.replace(color, css_variable)
    return svg
