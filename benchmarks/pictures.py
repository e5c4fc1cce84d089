"""The README's plots, docs/recipes.svg and docs/rivals.svg, from real runs and a real measurement,
drawn as `mlxgpt report` draws.

    pip install -e '.[report]'
    python benchmarks/pictures.py CLASSIC_RUN MODERN_RUN REPORT.json

The runs are those of `mlxgpt train --tier 1`, the second with `--recipe modern`; what is drawn of
them is the loss on held-out text. The file is what `mlxgpt bench --peers` wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mlxgpt.pages import plots
from mlxgpt.pages.course import course_of
from mlxgpt.pages.measurements import ratios
from mlxgpt.pages.page import COLORS
from mlxgpt.pages.plots import Line
from mlxgpt.reports import several
from mlxgpt.storage.run import open_run

DOCS = Path(__file__).parents[1] / "docs"
NAMES = ("classic", "modern")


def main(runs: list[str], measurement: str) -> None:
    drawn = []
    for n, (name, folder) in enumerate(zip(NAMES, runs, strict=True)):
        course = course_of(open_run(Path(folder)))
        loss = course.values["val_loss"]
        known = np.isfinite(loss)
        told = f"{name}, at the end {loss[known][-1]:.3f}"
        drawn.append(Line(told, course.steps[known], loss[known], markers=True, group=n))
    svg = plots.lines(drawn, "steps of 2,048 characters", "nats a character", name="recipes")
    save(svg, "recipes.svg")

    (measured,) = several.read([measurement])
    rows = [row for contest in measured.contests for row in ratios(contest)]
    label = (
        f"how many times as fast we are, on {measured.machine.chip}, {measured.machine.cores} cores"
    )
    svg = plots.intervals(rows, label, name="rivals", middle=1.0, log=True)
    save(svg, "rivals.svg")


def save(svgs: str, name: str) -> None:
    """The wide one of a page's two as a file of its own, with its colours, light and dark."""
    svg = svgs[: svgs.index("</svg>") + len("</svg>")]
    head, _, rest = svg.partition(">")
    (DOCS / name).write_text(f"{head}><style>{COLORS}</style>{rest}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:3], sys.argv[3])
