"""Render a measurement as a Markdown report, and write it next to its JSON file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mlxgpt.bench import chips
from mlxgpt.bench.markdown import format_number, format_stats, render_markdown_table
from mlxgpt.bench.records import Machine, Measurement, TierResult
from mlxgpt.utils import files


def render_benchmark_report(measurement: Measurement) -> str:
    """Render a measurement as Markdown, with aligned tables for reading as plain text."""
    machine, tiers = measurement.machine, measurement.tiers
    names = " and ".join(tier.name for tier in tiers)
    return "\n".join(
        [
            f"# {names} on {machine.chip}",
            "",
            f"Measured on {measurement.date[:10]} with `mlxgpt bench`, one process per config.",
            "",
            *render_markdown_table([*format_machine_rows(machine), ["time", measurement.date]]),
            "",
            "## Results",
            "",
            *render_markdown_table(
                [["", *(tier.name for tier in tiers)], *_result_rows(tiers)], ">"
            ),
            "",
            *_method_notes(tiers),
            "",
            "## How to reproduce",
            "",
            "In a checkout of the commit above, with nothing else running:",
            "",
            "    mlxgpt bench",
            "",
            *chips.render_chip_estimates(tiers),
        ]
    )


def format_machine_rows(machine: Machine) -> list[list[str]]:
    """Table rows (name, value) that describe a machine, after a header row."""
    fast_cores = (
        f" ({machine.performance_cores} performance cores)" if machine.performance_cores else ""
    )
    bandwidth = f"{format_number(machine.bandwidth / 1e9)} GB/s" if machine.bandwidth else ""
    return [
        ["machine", ""],
        ["chip", machine.chip],
        ["cores", f"{machine.cores}{fast_cores}"],
        ["memory", f"{machine.memory / 1e9:.1f} GB"],
        ["system", machine.system],
        ["MLX device", machine.backend],
        ["BLAS", machine.blas],
        *([["memory bandwidth", bandwidth]] if bandwidth else []),
        *([name, version] for name, version in machine.versions.items()),
        ["commit", machine.commit or "not a git checkout"],
        ["load average before", f"{machine.load:.2f}"],
    ]


def _result_rows(tiers: Sequence[TierResult]) -> list[list[str]]:
    columns = []
    for tier in tiers:
        t, g = tier.training, tier.generation
        columns.append(
            {
                "parameters": f"{tier.parameters:,}",
                "dtype": tier.dtype,
                "tokens per step": f"{t.tokens_per_step:,}",
                "training FLOPs per token": (f"{format_number(t.flops_per_token / 1e6)} MFLOP"),
                "training, tokens/s": format_number(t.tokens_per_second),
                "training, ms per step": format_stats(t.ms_per_step),
                "measured matmul peak": f"{format_number(t.matmul_peak / 1e9)} GFLOP/s",
                "training, % of the measured matmul peak": f"{100 * t.peak_share:.1f}%",
                "training, peak memory": f"{format_number(t.peak_memory / 1e6)} MB",
                "generation, time to first token, ms": format_stats(g.ms_to_first_token),
                "generation, tokens/s": format_stats(g.tokens_per_second),
            }
        )
    return [[name, *(column[name] for column in columns)] for name in columns[0]]


def _method_notes(tiers: Sequence[TierResult]) -> list[str]:
    lines = ["Values are medians (minimum to maximum):", ""]
    for tier in tiers:
        t, g = tier.training, tier.generation
        lines += [
            f"- {tier.name}, training: {len(t.ms_per_step.repeats)} repeats of "
            f"{t.steps_per_repeat} steps after {t.warmup_steps} warmup steps; memory of "
            f"{t.peak_memory_of}.",
            f"- {tier.name}, generation: {len(g.tokens_per_second.repeats)} samples of "
            f"{g.new_tokens} tokens after a prompt of {g.prompt_tokens}, and one warmup sample.",
        ]
    peak = (
        "The matmul peak is the faster of two measurements, one before and one after the benchmark."
    )
    return [*lines, "", peak]


def write_benchmark_report(measurement: Measurement, folder: Path) -> tuple[Path, Path]:
    """Write JSON and Markdown without overwriting earlier reports; returns both paths."""
    text = render_benchmark_report(measurement)
    folder.mkdir(parents=True, exist_ok=True)
    stem = find_unused_stem(folder, report_slug(measurement))
    json_path, markdown_path = folder / f"{stem}.json", folder / f"{stem}.md"
    files.write_atomically(json_path, measurement.to_json())
    files.write_atomically(markdown_path, text)
    return json_path, markdown_path


def find_unused_stem(folder: Path, stem: str) -> str:
    """`stem`, or `stem-2` and so on if the folder already has such a JSON or Markdown file."""
    candidate, number = stem, 1
    while any(files.exists(folder / f"{candidate}{suffix}") for suffix in (".json", ".md")):
        number += 1
        candidate = f"{stem}-{number}"
    return candidate


# Removed from chip names in file names: (R), clock rates, makers, generic words.
CHIP_NAME_NOISE = re.compile(r"\(\w+\)|@.*|\b(intel|amd|apple|nvidia|processor|cpu|[\w-]+-core)\b")


def report_slug(measurement: Measurement) -> str:
    """File name of a report: date and chip, as 2026-11-22-xeon-2-cores or 2026-11-22-m1-max."""
    machine = measurement.machine
    words = re.findall("[a-z0-9]+", CHIP_NAME_NOISE.sub(" ", machine.chip.lower())) or ["chip"]
    cores = [f"{machine.cores}-cores"] if machine.backend == "cpu" else []
    return "-".join([measurement.date[:10], *words, *cores])
