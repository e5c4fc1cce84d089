"""Render a comparison as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from mlxgpt.experiments.curves import Speedup
from mlxgpt.experiments.results import ComparisonRecord, VariantResult
from mlxgpt.experiments.statistics import PairedDifference
from mlxgpt.experiments.variants import format_diff

COMPARISON_COLUMNS = (
    "variant",
    "seeds",
    "bits per byte",
    "difference",
    "tokens",
    "time",
    "verdict",
)


def render_comparison(record: ComparisonRecord) -> str:
    """Render a record as Markdown, without its learning curves."""
    table = render_table(COMPARISON_COLUMNS, map(format_variant_row, record.variants))
    sections = [table, *format_notes(record), *_render_runs(record)]
    return "\n\n".join([f"# {record.name}", *sections]) + "\n"


def format_variant_row(result: VariantResult) -> list[str]:
    """Table row of a variant: one cell for each of COMPARISON_COLUMNS."""
    difference, mean = result.difference, result.mean_bits_per_byte
    return [
        result.name,
        str(len(result.trainings)),
        "–" if mean is None else f"{mean:.4f}",
        _format_difference(difference) if difference else "",
        _format_speedup(result.speed_up_tokens),
        _format_speedup(result.speed_up_seconds),
        result.verdict,
    ]


def format_notes(record: ComparisonRecord) -> list[str]:
    """Paragraphs that explain the table."""
    baseline = record.variants[0]
    correction_note = (
        ", corrected for repeated looks and multiple variants" if record.sequential else ""
    )
    eval_text = (
        f"{record.held_back_bytes:,} bytes held out of the training text"
        if record.judged_on == "held back"
        else "the validation text"
    )
    paragraphs = [f"{result.name}: {result.advice}." for result in record.variants if result.advice]
    paragraphs.append(
        f"Bits per byte on {eval_text} of {record.data}, with a budget of {record.budget} per "
        f"run. Differences are relative to {baseline.name}, paired by seed; negative is better. "
        f"± is a {100 * (1 - record.level):.4g}% confidence interval{correction_note}. "
        f"Tokens and time: speedup in reaching the final loss of {baseline.name}, "
        "although the schedule was not planned to end there."
    )
    if record.drift:
        slow, fast = record.drift
        paragraphs.append(
            f"Training speed compared with each variant's median: {slow:+.1%} to {fast:+.1%}."
        )
    if not record.sequential and len(set(record.looks)) > 1:
        paragraphs.append(
            f"Results were checked after {', '.join(map(str, record.looks))} seeds. Repeated "
            "checks find false differences more often than the intervals suggest; --until-decided "
            "corrects for this."
        )
    if record.final_looks:
        times = "once" if record.final_looks == 1 else f"{record.final_looks} times"
        paragraphs.append(f"The validation text was evaluated {times} in this comparison.")
    if record.interrupted:
        paragraphs.append("The comparison was interrupted; the same command resumes it.")
    return paragraphs


def _render_runs(record: ComparisonRecord) -> list[str]:
    header = ("variant", "differs in", "parameters", "steps", "tokens", "seconds", "per seed")
    rows = []
    for result in record.variants:
        # A run that was resumed for its last step has no measured speed.
        run_seconds = [run.curve.seconds[-1] for run in result.trainings if run.curve]
        finite_seconds = [seconds for seconds in run_seconds if math.isfinite(seconds)]
        median_seconds = f"{statistics.median(finite_seconds):,.0f}" if finite_seconds else ""
        scores = ", ".join(f"{run.bits_per_byte:.4f}" for run in result.trainings)
        sizes = (f"{result.parameters:,}", f"{result.steps:,}", f"{result.tokens:,}")
        rows.append((result.name, format_diff(result.changes), *sizes, median_seconds, scores))
    caption = (
        "Seconds: median training time, without evaluation, checkpoints and compilation. Machine:"
    )
    return [render_table(header, rows), f"{caption} {record.machine}."]


def render_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _format_difference(difference: PairedDifference) -> str:
    mean, high = difference.mean, difference.high
    return f"{mean:+.4f}" + (f" ± {high - mean:.4f}" if high is not None else "")


def _format_speedup(speedup: Speedup | None) -> str:
    if speedup is None:
        return ""
    return f"{speedup.ratio:.2f} ×"
