"""The comparison as Markdown tables, as (name, ratio) rows for a plot, and as files."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from baselines.records import MLXGPT, Comparison, TaskResult
from mlxgpt.bench import report
from mlxgpt.bench.markdown import format_stats, render_markdown_table
from mlxgpt.bench.records import Measurement, SummaryStats
from mlxgpt.utils import files

LOWER_IS_BETTER = ("ms_to_first_token", "peak_memory", "seconds_from_start")


def render_markdown(comparison: Comparison) -> str:
    """The whole report."""
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
        of_config = [r for r in results if r.config == name]
        training = _speeds(of_config, "training", "tokens_per_second", "tokens/s")
        lines += _section(f"{name}, training", training)
        lines += _section(f"{name}, generation", _generation(of_config))
        lines += _section(f"{name}, learning", _learning(of_config))
        title = "MB/s, training of the BPE included"
        preparation = _speeds(of_config, "preparation", "megabytes_per_second", title)
        lines += _section(f"{name}, data preparation", preparation)
    lines += ["## Versions", "", *render_markdown_table(_made_with(results)), ""]
    for r in results:
        lines += [
            f"- {framework} could not do {r.config}, {r.task}: {reason}"
            for framework, reason in r.failed.items()
        ]
    return "\n".join(lines).rstrip() + "\n"


def write_comparison(comparison: Comparison, folder: Path) -> tuple[Path, Path]:
    """Write JSON and Markdown next to earlier reports, never over them; both paths."""
    slug = report.report_slug(Measurement(comparison.date, comparison.machine, ()))
    stem = report.find_unused_stem(folder, f"{slug}-baselines")
    data, text = folder / f"{stem}.json", folder / f"{stem}.md"
    files.write_atomically(data, comparison.to_json())
    files.write_atomically(text, render_markdown(comparison))
    return data, text


def speed_ratios(result: TaskResult) -> Iterator[tuple[str, float, float, float]]:
    """(task and framework, how many times as fast mlxgpt is, at least, at most)."""

    def speeds(framework: str) -> list[float]:
        rounds = result.rounds.get(framework, [])
        return sorted(values.get("tokens_per_second", 0.0) for values in rounds)

    ours = speeds(MLXGPT)
    task = f"{result.texts} text" if result.task == "generate" else result.task
    label = f"{result.config}, {task}{'s' * (result.texts > 1)}"
    for framework in result.rounds:
        others = speeds(framework)
        if framework != MLXGPT and ours and min(*ours, *others) > 0:
            median = ours[len(ours) // 2] / others[len(others) // 2]
            yield f"{label}: {framework}", median, ours[0] / others[-1], ours[-1] / others[0]


def _section(title: str, rows: list[list[str]]) -> list[str]:
    return [f"## {title}", "", *render_markdown_table(rows, ">"), ""] if len(rows) > 1 else []


def _spread(result: TaskResult, framework: str, name: str) -> SummaryStats:
    return SummaryStats.from_values([values[name] for values in result.rounds[framework]])


def _ratio(result: TaskResult, framework: str, name: str) -> str:
    if framework == MLXGPT or MLXGPT not in result.rounds:
        return ""
    ours, other = (_spread(result, f, name).median for f in (MLXGPT, framework))
    return f"{other / ours if name in LOWER_IS_BETTER else ours / other:.2f}"


def _cells(result: TaskResult, framework: str, name: str, scale: float = 1.0) -> list[str]:
    spread = _spread(result, framework, name)
    scaled = SummaryStats.from_values([scale * value for value in spread.repeats])
    return [format_stats(scaled), _ratio(result, framework, name)]


def _speeds(results: Iterable[TaskResult], task: str, speed: str, title: str) -> list[list[str]]:
    """Speed and memory of a task of one kind.

    Args:
        speed: name of the measurement.
        title: of its column.
    """
    rows = [["", title, "*ratio*", "peak memory, MB", "*ratio*"]]
    for r in results:
        if r.task == task:
            for framework in r.rounds:
                cells = _cells(r, framework, speed)
                rows.append([framework, *cells, *_cells(r, framework, "peak_memory", 1e-6)])
    return rows


def _generation(results: Iterable[TaskResult]) -> list[list[str]]:
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
            row = [f"{r.texts}, {framework}", *_cells(r, framework, "tokens_per_second")]
            row += _cells(r, framework, "ms_to_first_token")
            row += _cells(r, framework, "seconds_from_start")
            rows.append([*row, *_cells(r, framework, "peak_memory", 1e-6)])
    return rows


def _learning(results: Iterable[TaskResult]) -> list[list[str]]:
    """The loss at the end of the same batches, and the time to the highest of these losses."""
    rows = [["", "nats per token, at the end", "seconds to the loss that all reach", "*ratio*"]]
    for r in results:
        if r.task != "learning":
            continue
        ends = {f: [values["curve"][-1][1] for values in rounds] for f, rounds in r.rounds.items()}
        target = max(max(losses) for losses in ends.values())
        reached = {
            f: SummaryStats.from_values([_seconds_to(target, values["curve"]) for values in rounds])
            for f, rounds in r.rounds.items()
        }
        for framework, spread in reached.items():
            ratio = spread.median / reached[MLXGPT].median if MLXGPT in reached else None
            shown = "" if ratio is None or framework == MLXGPT else f"{ratio:.2f}"
            loss = statistics.median(ends[framework])
            rows.append([framework, f"{loss:.4f}", format_stats(spread), shown])
    return rows


def _seconds_to(target: float, curve: Sequence[Sequence[float]]) -> float:
    """Seconds until a loss curve stays at or below `target`, linear between its points."""
    later = next(n for n in range(len(curve)) if all(loss <= target for _, loss in curve[n:]))
    if later == 0:
        return curve[0][0]
    (began, above), (ended, below) = curve[later - 1], curve[later]
    return float(np.interp(-target, [-above, -below], [began, ended]))


def _made_with(results: Iterable[TaskResult]) -> list[list[str]]:
    made_with: dict[str, dict[str, Any]] = {}
    for r in results:
        made_with |= r.made_with
    names = ("versions", "device", "threads", "BLAS", "compiler")
    rows = [[framework, *(m.get(n, "") for n in names)] for framework, m in made_with.items()]
    return [["", *names], *rows]
