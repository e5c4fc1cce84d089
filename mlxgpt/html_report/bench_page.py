"""A page on the measured speed of machines, with the estimates for Apple's chips."""

from __future__ import annotations

from collections.abc import Sequence

from mlxgpt.bench import report, side_by_side
from mlxgpt.bench.chips import CHIPS, estimated_training
from mlxgpt.bench.records import Measurement
from mlxgpt.html_report import plots
from mlxgpt.html_report.page import Figure, Page


def page_of(measurements: Sequence[Measurement]) -> Page:
    """A page on one machine, or on several side by side."""
    chips = ", ".join(one.machine.chip for one in measurements)
    page = Page(f"Measured on {chips}")
    _speeds(page, measurements)
    alone = len(measurements) == 1
    page.markdown(
        report.markdown(measurements[0]) if alone else side_by_side.markdown(measurements)
    )
    return page


def _speeds(page: Page, measurements: Sequence[Measurement]) -> None:
    page.heading("Training, measured and estimated")
    for tier in measurements[0].tiers:
        measured = [
            (f"{one.machine.chip}, {one.date[:10]}", t.training.tokens_per_second, True)
            for one in measurements
            for t in one.tiers
            if t.name == tier.name
        ]
        rows = [*measured, *((c.name, estimated_training(c, tier), False) for c in CHIPS)]
        label = "tokens per second in training, logarithmic"
        svg = plots.points(rows, label, name=f"speed of {tier.name}")
        caption = f"{tier.name}: filled was measured; hollow is estimated, not measured."
        told = "; ".join(f"{name}: {value:,.0f}" for name, value, _ in measured)
        slowest, fastest = rows[len(measured)], max(rows[len(measured) :], key=lambda row: row[1])
        seen = (
            f"{tier.name}, tokens per second in training. Measured, {told}. Estimated, from "
            f"{slowest[1]:,.0f} on an {slowest[0]} to {fastest[1]:,.0f} on an {fastest[0]}"
        )
        page.figure(Figure(svg, caption, seen))
