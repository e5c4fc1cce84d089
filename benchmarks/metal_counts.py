"""What both recipes of both tiers ask of Metal, counted from the graphs, and how fast each of
Apple's chips could be at most; beside what others measured of small models: the bound's own test.

    python benchmarks/metal_counts.py

Writes reports/metal-counts.json and .md. `make test` counts anew and compares, so that a change
that asks more of Metal shows as a change of these files.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlxgpt import config_files
from mlxgpt.config import Config, override
from mlxgpt.model.counting import count_parameters
from mlxgpt.reports.chips import CHIPS, bound
from mlxgpt.reports.counts import workloads
from mlxgpt.reports.markdown import figure, table
from mlxgpt.reports.records import Workload
from mlxgpt.reports.report import COUNTED, counted_rows

FOLDER = Path(__file__).with_name("reports")
# Public measurements of small trainings with MLX: chip, parameters, tokens a second, and the shape
# of a GPT-2 of about as many parameters, which stands in for theirs.
ELSEWHERE = (
    ("M3", 3.5e6, 65_000, {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 2048}),
    ("M4 Max", 15.7e6, 82_000, {"n_layer": 8, "n_embd": 384, "n_head": 6, "vocab_size": 4096}),
)


def tiers() -> dict[str, Config]:
    """Both tiers by both recipes, as a Mac would train them."""
    configs = {}
    for tier in (1, 2):
        for recipe in config_files.RECIPES:
            config = config_files.tier(tier, recipe)
            vocabulary = {} if config.model.vocab_size else {"vocab_size": 65}
            name = config_files.tier_name(tier, recipe)
            configs[name] = override(config, {"dtype": "float32", **vocabulary})
    return configs


def counted() -> dict[str, tuple[Workload, ...]]:
    """The counts of each."""
    return {name: workloads(config) for name, config in tiers().items()}


def as_tree(found: dict[str, tuple[Workload, ...]]) -> dict[str, Any]:
    """The counts as JSON has them, and the MLX whose graphs they are of."""
    tree = {name: [asdict(one) for one in several] for name, several in found.items()}
    return json.loads(json.dumps({"mlx": version("mlx"), "counted": tree}))


def rate_at_most(chip: str, workload: Workload) -> float:
    """Tokens a second that a chip cannot exceed; at its greater bandwidth, where it has two."""
    found = next(one for one in CHIPS if one.name == chip)
    return workload.tokens / min(bound(found, workload))


def _kinds(found: dict[str, tuple[Workload, ...]]) -> list[list[str]]:
    """Of training steps, the kinds of kernels that move most."""
    rows = [["", "kernels", "MB", "GFLOP"]]
    for name, (step, *_) in found.items():
        for kernel in step.kernels[:6]:
            size = figure(kernel.bytes / 1e6), figure(kernel.flops / 1e9)
            rows.append([f"{name}, {kernel.name}", str(kernel.launches), *size])
    return rows


def _bounds(found: dict[str, tuple[Workload, ...]]) -> list[list[str]]:
    chips = [chip for chip in CHIPS if chip.gb_per_second]
    rows = [["*predicted*, tokens/s at most", *(chip.name for chip in chips)]]
    for name, several in found.items():
        for one in several:
            if one.name in ("training step", "decoded token"):
                rates = [figure(rate_at_most(chip.name, one), 2) for chip in chips]
                rows.append([f"{name}, {one.name}", *rates])
    return rows


def _tests() -> list[list[str]]:
    rows = [["measured elsewhere", "tokens/s", "stand-in", "*predicted* at most", "share"]]
    for chip, parameters, rate, shape in ELSEWHERE:
        config = override(tiers()["tier2"], shape)
        most = rate_at_most(chip, workloads(config)[0])
        of = f"{parameters / 1e6:g}M on {chip}"
        stand_in = f"{count_parameters(config.model) / 1e6:.1f}M"
        share = f"{100 * rate / most:.0f} %"
        rows.append([of, f"{rate:,}", stand_in, figure(most, 2), share])
    return rows


def main() -> None:
    found = counted()
    (FOLDER / "metal-counts.json").write_text(json.dumps(as_tree(found), indent=1) + "\n")
    lines = [
        "# What Metal is asked to do, counted",
        "",
        "By `python benchmarks/metal_counts.py`, from the graphs that MLX would be given on a Mac,",
        "fused as MLX 0.32 fuses them. Nothing here was run on a Mac. Operations are those of the",
        "graph, without views; kernels are launches after fusion; the host hands over work, and",
        "reads results, and waits for those that are not there yet. The embedding's gradient",
        "counts as MLX's own scatter; with more than 1,024 ids ours takes about ten launches more.",
        "",
        *table([list(COUNTED), *counted_rows(found.items())], ">"),
        "",
        "Of a training step, the kinds of kernels that move most:",
        "",
        *table(_kinds(found), ">"),
        "",
        "## How fast a chip could be at most",
        "",
        "If each kind of kernel ran at the chip's peak or at its memory's bandwidth, whichever",
        "takes longer, every array were read from memory, and launching took no time.",
        "",
        *table(_bounds(found), ">"),
        "",
        "The bound's own test, by what was measured elsewhere (each has to be below 100 %):",
        "",
        *table(_tests(), ">"),
    ]
    (FOLDER / "metal-counts.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
