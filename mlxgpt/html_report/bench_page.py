"""HTML report of benchmarks: measured speeds, and estimates for Apple's chips."""

from __future__ import annotations

from collections.abc import Sequence

from mlxgpt.bench import report, side_by_side
from mlxgpt.bench.chips import CHIPS, estimate_training_speed
from mlxgpt.bench.records import Measurement
from mlxgpt.html_report import plots
from mlxgpt.html_report.page import Figure, Page


def build_benchmark_page(measurements: Sequence[Measurement]) -> Page:
    """Build the page for one machine, or for several side by side."""
    chips = ", ".join(measurement.machine.chip for measurement in measurements)
    page = Page(f"Benchmarks on {chips}")
    _add_speed_plots(page, measurements)
    if len(measurements) == 1:
        page.add_markdown(report.render_benchmark_report(measurements[0]))
    else:
        page.add_markdown(side_by_side.render_machine_comparison(measurements))
    return page


def _add_speed_plots(page: Page, measurements: Sequence[Measurement]) -> None:
    page.add_heading("Training speed, measured and estimated")
    for tier in measurements[0].tiers:
        measured = [
            (f"{m.machine.chip}, {m.date[:10]}", t.training.tokens_per_second, True)
            for m in measurements
            for t in m.tiers
            if t.name == tier.name
        ]
        estimated = [(chip.name, estimate_training_speed(chip, tier), False) for chip in CHIPS]
        label = "training tokens per second (log scale)"
        svg = plots.plot_points([*measured, *estimated], label, name=f"speed of {tier.name}")
        caption = f"{tier.name}: filled markers are measured, hollow markers are estimated."
        measured_text = "; ".join(f"{name}: {value:,.0f}" for name, value, _ in measured)
        slowest, fastest = estimated[0], max(estimated, key=lambda row: row[1])
        alt_text = (
            f"{tier.name}, training tokens per second. Measured: {measured_text}. Estimated: "
            f"from {slowest[1]:,.0f} on an {slowest[0]} to {fastest[1]:,.0f} on an {fastest[0]}"
        )
        page.add_figure(Figure(svg, caption, alt_text))
