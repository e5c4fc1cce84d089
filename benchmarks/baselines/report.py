"""Render a comparison as Markdown, as ratios for a plot, and write its files."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from baselines.records import MLXGPT, Comparison, TaskResult
from mlxgpt.bench import report
from mlxgpt.bench.markdown import format_stats, render_markdown_table
from mlxgpt.bench.records import Measurement, SummaryStats
from mlxgpt.utils import files


def render_markdown(comparison: Comparison) -> str:
    """Render the whole report as Markdown."""
    results = comparison.results
    rounds = max((len(rounds) for r in results for rounds in r.rounds.values()), default=0)
    lines = [
        f"# mlxgpt and other libraries on {comparison.machine.chip}",
        "",
        f"Measured on {comparison.date[:10]} with `python benchmarks/compare_baselines.py`,",
        "in turn A B A B, each time in a fresh process, with the same weights: the median of",
        f"{rounds} rounds, and the minimum and maximum. *Ratio*: how many times as fast mlxgpt is,",
        "or how many times as much time or memory the other takes; above 1, mlxgpt is better.",
        "",
        *render_markdown_table(
            [*report.format_machine_rows(comparison.machine), ["time", comparison.date]]
        ),
        "",
    ]
    for name in dict.fromkeys(r.config for r in results):
        config_results = [r for r in results if r.config == name]
        training = _speed_table(config_results, "training", "tokens_per_second", "tokens/s")
        lines += _section(f"{name}, training", training)
        lines += _section(f"{name}, generation", _generation_table(config_results))
        lines += _section(f"{name}, learning", _learning_table(config_results))
        title = "MB/s, training of the BPE included"
        preparation = _speed_table(config_results, "preparation", "megabytes_per_second", title)
        lines += _section(f"{name}, data preparation", preparation)
    lines += ["## Versions", "", *render_markdown_table(_versions_table(results)), ""]
    for r in results:
        lines += [
            f"- {framework} could not do {r.config}, {r.task}: {reason}"
            for framework, reason in r.failed.items()
        ]
    return "\n".join(lines).rstrip() + "\n"


def write_comparison(comparison: Comparison, folder: Path) -> tuple[Path, Path]:
    """Write JSON and Markdown without overwriting earlier reports; returns both paths."""
    slug = report.report_slug(Measurement(comparison.date, comparison.machine, ()))
    stem = report.find_unused_stem(folder, f"{slug}-baselines")
    json_path, markdown_path = folder / f"{stem}.json", folder / f"{stem}.md"
    files.write_atomically(json_path, comparison.to_json())
    files.write_atomically(markdown_path, render_markdown(comparison))
    return json_path, markdown_path


def _section(title: str, rows: list[list[str]]) -> list[str]:
    return [f"## {title}", "", *render_markdown_table(rows, ">"), ""] if len(rows) > 1 else []


def _summarize(result: TaskResult, framework: str, name: str) -> SummaryStats:
    return SummaryStats.from_values([values[name] for values in result.rounds[framework]])


LOWER_IS_BETTER = ("ms_to_first_token", "peak_memory", "seconds_from_start")


def _format_ratio(result: TaskResult, framework: str, name: str) -> str:
    if framework == MLXGPT or MLXGPT not in result.rounds:
        return ""
    mlxgpt_median = _summarize(result, MLXGPT, name).median
    median = _summarize(result, framework, name).median
    is_inverse = name in LOWER_IS_BETTER
    return f"{median / mlxgpt_median if is_inverse else mlxgpt_median / median:.2f}"


def _format_cells(result: TaskResult, framework: str, name: str, scale: float = 1.0) -> list[str]:
    stats = _summarize(result, framework, name)
    scaled_stats = SummaryStats.from_values([scale * value for value in stats.repeats])
    return [format_stats(scaled_stats), _format_ratio(result, framework, name)]


def _speed_table(
    results: Iterable[TaskResult], task: str, speed: str, title: str
) -> list[list[str]]:
    """Table of speed and memory of all frameworks in a task.

    Args:
        task: training or preparation.
        speed: name of the measured value.
        title: title of its column.
    """
    rows = [["", title, "*ratio*", "peak memory, MB", "*ratio*"]]
    for r in results:
        if r.task == task:
            for framework in r.rounds:
                cells = _format_cells(r, framework, speed)
                rows.append([framework, *cells, *_format_cells(r, framework, "peak_memory", 1e-6)])
    return rows


def _generation_table(results: Iterable[TaskResult]) -> list[list[str]]:
    rows = [
        [
            "texts, framework",
            "tokens/s",
            "*ratio*",
            "first token, ms",
            "*ratio*",
            "from the start of Python, s",
            "*ratio*",
            "peak memory, MB",
            "*ratio*",
        ]
    ]
    for r in results:
        if r.task != "generate":
            continue
        for framework in r.rounds:
            row = [f"{r.texts}, {framework}", *_format_cells(r, framework, "tokens_per_second")]
            row += _format_cells(r, framework, "ms_to_first_token")
            row += _format_cells(r, framework, "seconds_from_start")
            rows.append([*row, *_format_cells(r, framework, "peak_memory", 1e-6)])
    return rows


def _learning_table(results: Iterable[TaskResult]) -> list[list[str]]:
    """Table of the final loss after the same batches, and the time to the highest final loss."""
    rows = [["", "nats per token, at the end", "seconds to the loss that all reach", "*ratio*"]]
    for r in results:
        if r.task != "learning":
            continue
        final_losses = {
            framework: [values["curve"][-1][1] for values in rounds]
            for framework, rounds in r.rounds.items()
        }
        target = max(max(losses) for losses in final_losses.values())
        seconds = {
            framework: SummaryStats.from_values(
                [_seconds_to_loss(target, values["curve"]) for values in rounds]
            )
            for framework, rounds in r.rounds.items()
        }
        for framework, stats in seconds.items():
            ratio = stats.median / seconds[MLXGPT].median if MLXGPT in seconds else None
            ratio_cell = "" if ratio is None or framework == MLXGPT else f"{ratio:.2f}"
            loss = statistics.median(final_losses[framework])
            rows.append([framework, f"{loss:.4f}", format_stats(stats), ratio_cell])
    return rows


def _seconds_to_loss(target: float, curve: Sequence[Sequence[float]]) -> float:
    """Seconds until a loss curve stays at or below `target`, linear between its points."""
    index = next(n for n in range(len(curve)) if all(loss <= target for _, loss in curve[n:]))
    if index == 0:
        return curve[0][0]
    (seconds_before, loss_before), (seconds_after, loss_after) = curve[index - 1], curve[index]
    seconds = np.interp(-target, [-loss_before, -loss_after], [seconds_before, seconds_after])
    return float(seconds)


def _versions_table(results: Iterable[TaskResult]) -> list[list[str]]:
    environments: dict[str, dict[str, Any]] = {}
    for r in results:
        environments |= r.made_with
    names = ("versions", "device", "threads", "BLAS", "compiler")
    rows = [
        [framework, *(environment.get(name, "") for name in names)]
        for framework, environment in environments.items()
    ]
    return [["", *names], *rows]
