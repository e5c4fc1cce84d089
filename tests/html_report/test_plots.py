from __future__ import annotations

import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.html_report import plots
from mlxgpt.html_report.page import replace_unprintable
from mlxgpt.html_report.plots import MAX_LINE_POINTS, Line, downsample_min_max, moving_average
from mlxgpt.utils.errors import UserError

X = np.arange(5.0)


def parse_svgs(text: str) -> list[ElementTree.Element]:
    """Parse the SVGs, which must be valid XML."""
    wrapped = f"<all>{text.replace('xlink:href', 'href')}</all>"
    return list(ElementTree.fromstring(wrapped))


def find_texts(text: str) -> set[str]:
    return {
        part.strip()
        for svg in parse_svgs(text)
        for node in svg.iter()
        if (part := node.text or "").strip()
    }


def test_plot_has_two_widths_and_text_elements() -> None:
    lines = [Line("one", X, X**2), Line("two", X, X, markers=True)]
    text = plots.plot_lines(lines, "steps", "loss", name="a", events=[(2.0, "resumed")])
    wide, narrow = parse_svgs(text)
    assert (wide.get("class"), narrow.get("class")) == ("wide", "narrow")
    assert wide.get("width") is None, "the page sets the width"
    assert {"one", "two", "steps", "loss", "resumed"} <= find_texts(text)
    assert "DejaVu" not in text
    (half,) = parse_svgs(plots.plot_lines(lines, "x", "y", name="b", half_width=True))
    assert half.get("class") == "half"


def test_colors_are_css_variables() -> None:
    text = plots.plot_lines([Line("one", X, X), Line("two", X, -X)], "x", "y", name="a")
    colors = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", text)) - {"none"}
    assert colors == {"var(--ink)", "var(--rule)", "var(--line-1)", "var(--line-2)"}


def test_lines_differ_in_dashes() -> None:
    lines = [Line(str(n), X, X + n, group=0) for n in range(5)]
    text = plots.plot_lines(lines, "x", "y", name="a", half_width=True)
    dashes = set(re.findall(r"stroke-dasharray: ([^;\"]+)", text))
    assert len(dashes) == 4, "the first line is solid"
    assert "var(--line-2)" not in text, "one color per group"


def test_hostile_names() -> None:
    for name in ("<script>", "$x^2$", "\0\x1b", "%s {0}", "_hidden", "$\\frac{"):
        text = plots.plot_lines([Line(name, X, X), Line("b", X, X)], name, name, name=name)
        assert "<script" not in text
        assert len(parse_svgs(text)) == 2
        assert any(replace_unprintable(name) in word for word in find_texts(text)), (
            "also in the legend"
        )
    assert "$x^2$" in find_texts(plots.plot_intervals([("$x^2$", 1, 0, 2)], "x", name="a"))


def test_plots_without_data() -> None:
    empty = np.array([])
    for lines in ([], [Line("a", empty, empty)], [Line("a", X, X * np.nan)]):
        assert parse_svgs(plots.plot_lines(lines, "x", "y", name="a"))


def test_plots_are_reproducible_with_unique_ids() -> None:
    first, repeated, second = (plots.plot_lines([Line("a", X, X)], "x", "y", name=n) for n in "aab")
    assert first == repeated

    def ids(text: str) -> set[str]:
        return set(re.findall(r' id="([mpch][0-9a-f]{8,})"', text))

    assert ids(first)
    assert not ids(first) & ids(second)


def test_forest_and_dot_plots_label_rows_and_ticks() -> None:
    rows = [("a", 0.5, 0.25, 1.0), ("b", 2.0, None, None)]
    text = plots.plot_intervals(rows, "ratio", name="a")
    assert {"a", "b", "ratio", "1.00"} <= find_texts(text)
    assert {"a", "1,000"} <= find_texts(
        plots.plot_points([("a", 1000.0, True), ("b", 10.0, False)], "x", name="a")
    )


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=3000))
def test_downsampling_preserves_peaks(values: list[float]) -> None:
    y = np.array(values, dtype=float)
    x, sampled = downsample_min_max(np.arange(len(y), dtype=float), y)
    finite = y[np.isfinite(y)]
    assert len(sampled) <= MAX_LINE_POINTS + 2
    assert (np.diff(x) > 0).all()
    if len(finite):
        assert (sampled.min(), sampled.max()) == (finite.min(), finite.max())
        assert (sampled[0], sampled[-1]) == (finite[0], finite[-1])
    assert set(sampled) <= set(finite)


def test_moving_average_does_not_lag() -> None:
    line = 3.0 * np.arange(50) + 1
    np.testing.assert_allclose(moving_average(line, 9), line)
    y = np.array([1.0, np.nan, 3.0, 5.0, 7.0])
    np.testing.assert_allclose(moving_average(y, 3), [1, np.nan, 4, 5, 7])
    noise = np.random.default_rng(0).normal(size=1000)
    assert moving_average(noise, 100)[100:900].std() < 0.2
    assert len(moving_average(np.array([]), 3)) == 0


def test_y_axis_is_clipped_to_exclude_outliers() -> None:
    y = np.concatenate([[100.0], np.linspace(2, 1, 100)])
    assert "1.4" in find_texts(
        plots.plot_lines([Line("a", np.arange(101.0), y)], "x", "y", name="a")
    )
    # Frequent high values are not outliers.
    y = np.repeat([100.0, 1.0], 50)
    assert "1.4" not in find_texts(
        plots.plot_lines([Line("a", np.arange(100.0), y)], "x", "y", name="a")
    )


def test_missing_matplotlib_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="need matplotlib") as error:
        plots.plot_lines([], "x", "y", name="a")
    assert "pip install" in error.value.remedy
