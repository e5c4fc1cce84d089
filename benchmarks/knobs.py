"""What each setting does: short runs that differ from a small GPT-2 in one setting, three seeds.

    python benchmarks/knobs.py characters --source input.txt
    python benchmarks/knobs.py stories --source train.txt --plot docs/figures/knobs-stories.svg

Prints a table and plots a curve for each setting. All runs see the same number of tokens of the
same text, and are judged on the end of it, which is held out, in bits per byte. The same command
resumes; runs are shared with `mlxgpt compare` and trained once.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlxgpt  # isort: skip  # loads its BLAS before mlx.core is imported

from mlxgpt.bench.markdown import render_markdown_table
from mlxgpt.config import Config, override_config
from mlxgpt.config.resolve import resolve_config
from mlxgpt.experiments.results import VariantResult
from mlxgpt.experiments.statistics import ALPHA, confidence_interval

STEP_TOKENS = 2048
BASE: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 128, "dropout": 0.0, "bias": False}
BASE |= {"block_size": 128, "batch_size": 16, "learning_rate": 3e-3, "warmup_steps": 25}
TEXTS: dict[str, dict[str, Any]] = {
    "characters": {"tokenizer": "char"},
    "stories": {"tokenizer": "bpe", "vocab_size": 2048},
}


@dataclass(frozen=True)
class Knob:
    """A setting, the settings that change with it, and its values by the text they are for."""

    name: str
    values: tuple[Any, ...]
    is_log: bool = True
    label: str = ""
    settings: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def changes(self, value: Any) -> dict[str, Any]:
        """Settings that differ from the base for a value."""
        return {self.name: value, **self.settings.get(value, {})}


def widths(*values: int) -> Knob:
    """Widths with heads of 64."""
    settings = {n: {"n_head": n // 64} for n in values}
    return Knob("n_embd", values, label="width n_embd", settings=settings)


def contexts(*values: int) -> Knob:
    """Context lengths with the same number of tokens per step."""
    settings = {n: {"batch_size": STEP_TOKENS // n} for n in values}
    return Knob("block_size", values, label="context block_size", settings=settings)


KNOBS = (
    Knob("n_layer", (1, 2, 4), label="depth n_layer"),
    widths(64, 128, 192),
    Knob("n_head", (1, 2, 4), label="heads n_head, width 128"),
    contexts(32, 64, 128),
    Knob("batch_size", (8, 16, 32), label="sequences per step batch_size"),
    Knob("learning_rate", (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), label="learning rate"),
    Knob("dropout", (0.0, 0.2), is_log=False, label="dropout"),
)
VOCABULARIES = {
    "characters": Knob(
        "vocab_size",
        (512, 1024),
        label="BPE vocabulary; dashed: characters",
        settings={n: {"tokenizer": "bpe"} for n in (512, 1024)},
    ),
    "stories": Knob("vocab_size", (512, 2048), label="BPE vocabulary"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("text", choices=TEXTS)
    parser.add_argument("--source", required=True, metavar="FILE")
    parser.add_argument("--tokens", default="500k", help="training tokens of a run (default: 500k)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--knobs", nargs="+", metavar="SETTING", help="only these settings")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    _, config = resolve_config(None, "tier1", source=args.source, **BASE, **TEXTS[args.text])
    results = []
    for knob in (*KNOBS, VOCABULARIES[args.text]):
        if not args.knobs or knob.name in args.knobs:
            base, values = compare_values(knob, config, f"{args.tokens}tokens", args.seeds)
            results.append((knob, base, values))
            print("\n".join(render_table(knob, base, values)), flush=True)
    if args.plot:
        plot(results, args.plot)


def compare_values(
    knob: Knob, config: Config, budget: str, seeds: int
) -> tuple[VariantResult, list[VariantResult]]:
    """Results of the base, and of each value; the base is one of them, unless all differ."""
    variants = {value: override_config(config, knob.changes(value)) for value in knob.values}
    others = {value: variant for value, variant in variants.items() if variant != config}
    record = mlxgpt.compare(
        config, *others.values(), budget=budget, seeds=seeds, name=f"knob-{knob.name}"
    )
    if record.interrupted:
        sys.exit("interrupted; the same command resumes")
    base, *rest = record.variants
    by_value = dict(zip(others, rest, strict=True))
    return base, [by_value.get(value, base) for value in knob.values]


def render_table(knob: Knob, base: VariantResult, results: list[VariantResult]) -> list[str]:
    """Bits per byte of each value, with the 95% interval of its difference from the base."""
    rows = [[knob.name, "parameters", "steps", "bits per byte", "difference from the base"]]
    for value, result in zip(knob.values, results, strict=True):
        difference = "base"
        if result is not base and result.difference:
            mean, high = result.difference.mean, result.difference.high
            difference = f"{mean:+.3f}" + (f" ± {high - mean:.3f}" if high is not None else "")
        sizes = f"{result.parameters:,}", f"{result.steps:,}"
        rows.append([f"{value:g}", *sizes, f"{result.mean_bits_per_byte:.3f}", difference])
    return ["", *render_markdown_table(rows)]


def plot(results: list[tuple[Knob, VariantResult, list[VariantResult]]], path: Path) -> None:
    """Plot bits per byte over each setting, with 95% intervals over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes = list(figure.subplots(2, 4, sharey=True).flat)
    for axis, (knob, base, values) in zip(axes, results, strict=False):
        means, errors = [], []
        for result in values:
            losses = [run.bits_per_byte for run in result.trainings]
            low, high = confidence_interval(losses, ALPHA)
            means.append(result.mean_bits_per_byte)
            errors.append(0.0 if low is None or high is None else (high - low) / 2)
        axis.errorbar(knob.values, means, yerr=errors, marker="o", capsize=3)
        axis.axhline(base.mean_bits_per_byte, linestyle="--", color="gray", linewidth=0.8)
        if knob.is_log:
            axis.set_xscale("log", base=10 if knob.name == "learning_rate" else 2)
        axis.set_xticks(knob.values, [f"{value:g}" for value in knob.values])
        axis.minorticks_off()
        axis.set_xlabel(knob.label)
    for axis in axes[len(results) :]:
        axis.remove()
    figure.supylabel("bits per byte, held-out")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
