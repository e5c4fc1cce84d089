"""Plot recipes.svg, the validation losses of two runs in the README, with the plots of `mlxgpt
report`.

    pip install -e '.[report]'
    python docs/figures/recipes.py CLASSIC_RUN MODERN_RUN

The runs are from `mlxgpt train --tier 1`, the second with `--recipe modern`.
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

RECIPES = ("classic", "modern")
SVG_PATH = Path(__file__).with_name("recipes.svg")


def main(run_folders: list[str]) -> None:
    """Plot the figure, and save it with its light and dark colors."""
    lines = []
    for n, (recipe, folder) in enumerate(zip(RECIPES, run_folders, strict=True)):
        metrics = load_run_metrics(open_run(Path(folder)))
        loss = metrics.values["val_loss"]
        is_known = np.isfinite(loss)
        label = f"{recipe}, at the end {loss[is_known][-1]:.3f}"
        lines.append(Line(label, metrics.steps[is_known], loss[is_known], markers=True, group=n))
    svgs = plots.plot_lines(
        lines, "steps of 2,048 characters", "nats per character", name="recipes"
    )
    svg = svgs[: svgs.index("</svg>") + len("</svg>")]  # the first is for wide pages
    opening_tag, _, content = svg.partition(">")
    SVG_PATH.write_text(
        f'{opening_tag} width="700"><style>{CSS_COLORS}</style>{content}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
