"""Plot recipes.svg and baselines.svg for the README, from two runs and a comparison with other
libraries, with the plots of `mlxgpt report`.

    pip install -e '.[report]'
    python docs/figures/plots.py CLASSIC_RUN MODERN_RUN REPORT.json

The runs are from `mlxgpt train --tier 1`, the second with `--recipe modern`; their validation
losses are plotted. The report is from benchmarks/compare_baselines.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mlxgpt.html_report import plots
from mlxgpt.html_report.page import CSS_COLORS
from mlxgpt.html_report.plots import Line
from mlxgpt.html_report.run_metrics import load_run_metrics
from mlxgpt.storage.run import open_run

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from baselines.records import Comparison
from baselines.report import speed_ratios

RECIPES = ("classic", "modern")


def main(run_folders: list[str], report_path: Path) -> None:
    """Plot and save both figures."""
    lines = []
    for n, (recipe, folder) in enumerate(zip(RECIPES, run_folders, strict=True)):
        metrics = load_run_metrics(open_run(Path(folder)))
        loss = metrics.values["val_loss"]
        is_known = np.isfinite(loss)
        label = f"{recipe}, at the end {loss[is_known][-1]:.3f}"
        lines.append(Line(label, metrics.steps[is_known], loss[is_known], markers=True, group=n))
    svg = plots.plot_lines(lines, "steps of 2,048 characters", "nats per character", name="recipes")
    save_svg(svg, "recipes.svg")

    comparison = Comparison.from_json(report_path.read_text(encoding="utf-8"))
    rows = [row for result in comparison.results for row in speed_ratios(result)]
    machine = comparison.machine
    label = f"how many times as fast mlxgpt is, on {machine.chip}, {machine.cores} cores"
    svg = plots.plot_intervals(rows, label, name="baselines", reference=1.0, log=True)
    save_svg(svg, "baselines.svg")


FIGURES_DIR = Path(__file__).parent


def save_svg(svgs: str, name: str) -> None:
    """Write the first, wide SVG of a plot to a file, with its light and dark colors."""
    svg = svgs[: svgs.index("</svg>") + len("</svg>")]
    opening_tag, _, content = svg.partition(">")
    styled_svg = f"{opening_tag}><style>{CSS_COLORS}</style>{content}\n"
    (FIGURES_DIR / name).write_text(styled_svg, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:3], Path(sys.argv[3]))
