"""A measurement as a report in Markdown, beside its JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mlxgpt.bench import chips
from mlxgpt.bench.markdown import figure, spread_of, table
from mlxgpt.bench.records import Machine, Measurement, Tier
from mlxgpt.utils import files


def markdown(measurement: Measurement) -> str:
    """The report; it can be read as plain text, too."""
    machine, tiers = measurement.machine, measurement.tiers
    names = " and ".join(tier.name for tier in tiers)
    return "\n".join(
        [
            f"# {names} on {machine.chip}",
            "",
            f"Measured on {measurement.date[:10]} with `mlxgpt bench`, each in a fresh process.",
            "",
            *table([*machine_rows(machine), ["time", measurement.date]]),
            "",
            "## Measured",
            "",
            *table([["", *(tier.name for tier in tiers)], *_rows(tiers)], ">"),
            "",
            *_how(tiers),
            "",
            "## To measure it again",
            "",
            "With nothing else running, in a checkout of the commit above:",
            "",
            "    mlxgpt bench",
            "",
            *chips.estimates(tiers),
        ]
    )


def machine_rows(m: Machine) -> list[list[str]]:
    """A machine's name and value in each row, below a head."""
    fast = f", {m.performance_cores} of them fast" if m.performance_cores else ""
    return [
        ["machine", ""],
        ["chip", m.chip],
        ["cores", f"{m.cores}{fast}"],
        ["memory", f"{m.memory / 1e9:.1f} GB"],
        ["system", m.system],
        ["MLX computes on", m.backend],
        ["BLAS", m.blas],
        *([["memory's bandwidth", f"{figure(m.bandwidth / 1e9)} GB/s"]] if m.bandwidth else []),
        *([name, version] for name, version in m.versions.items()),
        ["commit", m.commit or "not a checkout"],
        ["load before", f"{m.load:.2f}"],
    ]


def _rows(tiers: Sequence[Tier]) -> list[list[str]]:
    columns = []
    for tier in tiers:
        t, g = tier.training, tier.generation
        columns.append(
            {
                "parameters": f"{tier.parameters:,}",
                "numbers": tier.dtype,
                "tokens in a step": f"{t.tokens_per_step:,}",
                "operations for a token in training": f"{figure(t.flops_per_token / 1e6)} MFLOP",
                "training, tokens/s": figure(t.tokens_per_second),
                "training, ms a step": spread_of(t.ms_per_step),
                "peak of a matrix product": f"{figure(t.matmul_peak / 1e9)} GFLOP/s",
                "training's share of that peak": f"{100 * t.peak_share:.1f} %",
                "peak memory in training": f"{figure(t.peak_memory / 1e6)} MB",
                "generation, first token after, ms": spread_of(g.ms_to_first_token),
                "generation, tokens/s": spread_of(g.tokens_per_second),
            }
        )
    return [[name, *(column[name] for column in columns)] for name in columns[0]]


def _how(tiers: Sequence[Tier]) -> list[str]:
    lines = ["The median, in brackets the least and the most:", ""]
    for tier in tiers:
        t, g = tier.training, tier.generation
        lines += [
            f"- {tier.name}, training: {len(t.ms_per_step.repeats)} repeats of "
            f"{t.steps_per_repeat} steps, after {t.warmup_steps} to warm up; memory of "
            f"{t.peak_memory_of}.",
            f"- {tier.name}, generation: {len(g.tokens_per_second.repeats)} texts of "
            f"{g.new_tokens} tokens, after a prompt of {g.prompt_tokens}, and one to warm up.",
        ]
    peak = "The peak is that of one large product, the faster of one before and one after."
    return [*lines, "", peak]


def write(measurement: Measurement, folder: Path) -> tuple[Path, Path]:
    """Write JSON and Markdown next to earlier reports, never over them; both paths."""
    text = markdown(measurement)
    folder.mkdir(parents=True, exist_ok=True)
    stem = unused_stem(folder, slug(measurement))
    data, report = folder / f"{stem}.json", folder / f"{stem}.md"
    files.write_atomically(data, measurement.to_json())
    files.write_atomically(report, text)
    return data, report


def unused_stem(folder: Path, stem: str) -> str:
    """`stem`, or `stem-2` and so on, of which the folder has neither JSON nor Markdown."""
    candidate, number = stem, 1
    while any(files.exists(folder / f"{candidate}{suffix}") for suffix in (".json", ".md")):
        number += 1
        candidate = f"{stem}-{number}"
    return candidate


# What the systems add to a chip's name: (R), a clock rate, makers, and words that say nothing.
NOISE = re.compile(r"\(\w+\)|@.*|\b(intel|amd|apple|nvidia|processor|cpu|[\w-]+-core)\b")


def slug(measurement: Measurement) -> str:
    """A report's name: its day and its chip, as 2026-11-22-xeon-2-cores or 2026-11-22-m1-max."""
    machine = measurement.machine
    words = re.findall("[a-z0-9]+", NOISE.sub(" ", machine.chip.lower())) or ["chip"]
    cores = [f"{machine.cores}-cores"] if machine.backend == "cpu" else []
    return "-".join([measurement.date[:10], *words, *cores])
