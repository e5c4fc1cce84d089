"""Makes recipes.svg, the picture in the README: how Tier 1 learns by each recipe, from real runs.

    pip install 'matplotlib>=3.9,<4'
    python docs/recipes.py runs/tier1-shakespeare runs/tier1-modern-shakespeare

Each is trained by `mlxgpt train --tier 1`, the second with `--recipe modern`; what is drawn is the
validation loss in their metrics.jsonl.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from mlxgpt.storage.run import open_run

PICTURE = Path(__file__).with_name("recipes.svg")
INK = "#777777"  # read on white and on black
STYLES = (("classic", "#d1495b", "o", "-"), ("modern", "#2e86ab", "s", "--"))


def main(folders: list[str]) -> None:
    plt.rcParams |= {"svg.fonttype": "none", "font.family": "sans-serif", "text.color": INK}
    figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for (name, color, marker, line), folder in zip(STYLES, folders, strict=True):
        found = [m for m in open_run(Path(folder)).metrics() if "val_loss" in m]
        steps, losses = [m["step"] for m in found], [m["val_loss"] for m in found]
        axes.plot(steps, losses, line, marker=marker, markersize=4, color=color)
        axes.annotate(
            f"{name}, {losses[-1]:.3f}",
            (steps[-1], losses[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color,
        )
    axes.set_xlabel("steps of 2,048 characters", color=INK)
    axes.set_ylabel("validation loss, nats a character", color=INK)
    axes.tick_params(colors=INK)
    axes.grid(color=INK, alpha=0.25)
    axes.margins(x=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    figure.savefig(PICTURE, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])
