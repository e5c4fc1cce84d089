"""Plots as SVG, by matplotlib, in one style: light or dark as the reader has it, told apart without
colour, text as text.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxgpt.html_report.page import shown
from mlxgpt.utils.errors import UserError

# Colours that stand for what the page's style says: ink, what is faint, rules, and lines.
INK, FAINT, RULE = "#010101", "#020202", "#030303"
LINES = ("#040401", "#040402", "#040403", "#040404", "#040405")
MEANING = {INK: "var(--ink)", FAINT: "var(--faint)", RULE: "var(--rule)"} | {
    color: f"var(--line-{n})" for n, color in enumerate(LINES, 1)
}
DASHES = ("-", (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (1.5, 1.5)), (0, (9, 2, 1, 2, 1, 2)))
MARKERS = ("o", "s", "^", "D", "v")
MOST_POINTS = 600  # of a line: as many as a page has columns
LONGEST_NAME = 40  # letters
WIDE, NARROW, HEIGHT = 5.8, 4.0, 2.8  # inches; what is for half a page, or a phone, is narrow


@dataclass(frozen=True)
class Line:
    """A line of a plot.

    Attributes:
        name: in the legend.
        x, y: its points; of many, those that are seen are drawn.
        raw: y before it was smoothed, drawn faint behind it.
        low, high: of a band around it.
        markers: a mark on each point.
        group: lines of one group have one colour; default: each has its own.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    raw: np.ndarray | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    markers: bool = False
    group: int | None = None


def lines(
    drawn: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    name: str,
    events: Sequence[tuple[float, str]] = (),
    small: bool = False,
) -> str:
    """Lines as SVG.

    Args:
        name: of the figure, unlike any other's on its page.
        events: places on the x axis, and what happened there.
        small: for half the page's width.
    """

    def draw(axes: Any) -> None:
        for n, line in enumerate(drawn):
            _draw(axes, line, n)
        for place, what in events:
            axes.axvline(place, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
            where = axes.get_xaxis_transform()
            told = {"color": FAINT, "rotation": 90, "va": "top", "ha": "right", "fontsize": 6.5}
            axes.text(place, 0.98, f"{what} ", transform=where, **told)
        axes.set_xlabel(shown(x_label))
        axes.set_ylabel(shown(y_label))
        _fit(axes, drawn)
        if len(drawn) > 1:
            _legend(axes)

    return _svg(draw, name, HEIGHT, small=small)


def _draw(axes: Any, line: Line, n: int) -> None:
    own = n if line.group is None else line.group
    color, dash = LINES[own % len(LINES)], DASHES[n % len(DASHES)]
    if line.raw is not None:
        axes.plot(*thinned(line.x, line.raw), color=color, linewidth=0.6, alpha=0.35)
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
    marker = MARKERS[own % len(MARKERS)] if line.markers or len(line.x) == 1 else None
    axes.plot(
        *thinned(line.x, line.y),
        color=color,
        linestyle=dash,
        marker=marker,
        markersize=4,
        linewidth=1.5,
        label=_name(line.name),
    )


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, handlelength=4, loc="best", fontsize=7.5)


def _name(text: str) -> str:
    """A name that leaves room for what it names, and that matplotlib does not leave out of a legend
    as it does those that begin with an underscore.
    """
    text = shown(text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…")
    return f"\u200b{text}" if text.startswith("_") else text


def _fit(axes: Any, drawn: Sequence[Line]) -> None:
    """Leave out of the picture what stands far above all the rest, as a first loss does."""
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in drawn] or [np.zeros(0)])
    if len(values) < 20:
        return
    low, usual = values.min(), np.quantile(values, 0.98)
    if usual > low and values.max() > usual + (usual - low):
        axes.set_ylim(low - 0.05 * (usual - low), usual + 0.25 * (usual - low))


def intervals(
    rows: Sequence[tuple[str, float, float | None, float | None]],
    x_label: str,
    *,
    name: str,
    middle: float = 0.0,
    log: bool = False,
) -> str:
    """A forest plot: a point for each (name, value, low, high) with its interval, and a line where
    there is no difference.
    """

    def draw(axes: Any) -> None:
        for n, (_, value, low, high) in enumerate(rows):
            if low is not None and high is not None:
                axes.plot([low, high], [-n, -n], color=INK, linewidth=1.4)
            axes.plot([value], [-n], color=INK, marker="o", markersize=4.5)
        axes.axvline(middle, color=FAINT, linewidth=1, linestyle=(0, (4, 2)))
        _rows(axes, [row[0] for row in rows], x_label)
        if log:
            _logarithmic(axes)

    return _svg(draw, name, 0.6 + 0.2 * len(rows))


def points(rows: Sequence[tuple[str, float, bool]], x_label: str, *, name: str) -> str:
    """A point on a logarithmic axis for each (name, value, whether it was measured): filled where
    it was, else hollow.
    """

    def draw(axes: Any) -> None:
        for n, (_, value, measured) in enumerate(rows):
            filled = LINES[1] if measured else "none"
            axes.plot([value], [-n], "o", markersize=5.5, color=LINES[1], markerfacecolor=filled)
        _rows(axes, [row[0] for row in rows], x_label)
        axes.grid(visible=True, axis="y", linestyle=(0, (1, 3)))
        _logarithmic(axes)

    return _svg(draw, name, 0.6 + 0.2 * len(rows))


def _rows(axes: Any, names: Sequence[str], x_label: str) -> None:
    axes.set_yticks([-n for n in range(len(names))], [_name(name) for name in names], fontsize=7.5)
    axes.set_ylim(0.6 - len(names), 0.6)
    axes.set_xlabel(shown(x_label), fontsize=7.5)
    axes.grid(visible=False, axis="y")


def _logarithmic(axes: Any) -> None:
    """A logarithmic x-axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    low, high = axes.xaxis.get_view_interval()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def smoothed(y: np.ndarray, over: int) -> np.ndarray:
    """Each point's mean with as many before as after it, `over` in all, fewer at the ends; what is
    no number is left out. (A mean of those before it alone would lag behind.)
    """
    known = np.isfinite(y)
    sums, counts = (np.concatenate([[0.0], np.cumsum(v)]) for v in (np.where(known, y, 0), known))
    at = np.arange(len(y))
    half = np.minimum(np.minimum(at, len(y) - 1 - at), over // 2)
    low, high = at - half, at + half + 1
    count = counts[high] - counts[low]
    means = np.divide(sums[high] - sums[low], count, out=np.full(len(y), np.nan), where=count > 0)
    return np.where(known, means, np.nan)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of many points the least and the greatest of every stretch, so that nothing seen is lost;
    what is no number is left out.
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= MOST_POINTS:
        return x, y
    kept = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), MOST_POINTS // 2):
        kept |= {int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])}
    places = sorted(kept)
    return x[places], y[places]


SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # a run may be called $x$
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": RULE,
    "axes.grid": True,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 6),
}


def _svg(draw: Callable[[Any], None], name: str, height: float, *, small: bool = False) -> str:
    """What is drawn, for a wide page and for a narrow one, of which style shows the one that fits;
    or for half a page alone.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "a page's plots need matplotlib, which is not installed",
            "get it: pip install 'matplotlib>=3.9,<4'.",
        ) from None
    svgs = []
    for kind, width in (("half", NARROW),) if small else (("wide", WIDE), ("narrow", NARROW)):
        # Ids unlike those of a page's other figures, and the same each time.
        salt = {"svg.hashsalt": f"{name}, {kind}"}
        settings: Any = SETTINGS | salt
        with matplotlib.rc_context(settings), warnings.catch_warnings():
            # Its letters are the reader's; which ones matplotlib's own font has is all the same.
            warnings.filterwarnings("ignore", "Glyph .* missing")
            figure = Figure(figsize=(width, 0.75 * height if small else height))
            figure.set_layout_engine("constrained")
            draw(figure.subplots())
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        svgs.append(_tidied(out.getvalue(), kind))
    return "".join(svgs)


def _tidied(svg: str, kind: str) -> str:
    """SVG for a page: as wide as that is, in its letters and its colours."""
    svg = svg[svg.index("<svg ") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*" height="[^"]*"', rf'<svg class="{kind}" \1', svg)
    svg = re.sub(r"(font: [\d.]+px|font-family:) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    for color, meaning in MEANING.items():
        svg = svg.replace(color, meaning)
    return svg
