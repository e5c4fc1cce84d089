"""Us and our rivals, as tables: what rivals/contest.py measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mlxgpt.reports.markdown import spread_of, table
from mlxgpt.reports.records import Spread
from mlxgpt.rivals.record import US, Contest


def markdown(contests: Sequence[Contest]) -> list[str]:
    """The section on them; nothing without any."""
    if not contests:
        return []
    rounds = max(len(rounds) for one in contests for rounds in one.rounds.values())
    lines = [
        "## Beside others",
        "",
        f"In turn A B A B, each time in a fresh process: the median of {rounds} rounds, in",
        "brackets the least and the most. The same weights. *Ours*: how many times as",
        "fast we are, or how much more time or memory they take; above 1 is better for us.",
        "",
    ]
    for name in dict.fromkeys(one.config for one in contests):
        of = [one for one in contests if one.config == name]
        lines += _section(f"{name}, training", _training(of, "training"))
        lines += _section(f"{name}, generation", _generation(of))
        lines += _section(f"{name}, learning", _learning(of))
        lines += _section(f"{name}, text made ready", _preparation(of))
    lines += ["### What each ran with", "", *table(_made_with(contests)), ""]
    for one in contests:
        lines += [
            f"- {who} could not do {one.config}, {one.what}: {why}"
            for who, why in one.failed.items()
        ]
    return [*lines, ""] if lines[-1] else lines


def _section(title: str, rows: list[list[str]]) -> list[str]:
    return [f"### {title}", "", *table(rows, ">"), ""] if len(rows) > 1 else []


def _spread(contest: Contest, who: str, name: str) -> Spread:
    return Spread.of([figures[name] for figures in contest.rounds[who]])


def _ratio(contest: Contest, who: str, name: str, *, less_is_more: bool = False) -> str:
    if who == US or US not in contest.rounds:
        return ""
    ours, theirs = (_spread(contest, one, name).median for one in (US, who))
    return f"{theirs / ours if less_is_more else ours / theirs:.2f}"


def _cells(contest: Contest, who: str, name: str, scale: float = 1.0) -> list[str]:
    spread = _spread(contest, who, name)
    scaled = Spread.of([scale * value for value in spread.repeats])
    return [spread_of(scaled), _ratio(contest, who, name, less_is_more=name in LESS)]


LESS = ("ms_to_first_token", "peak_memory", "seconds_from_start")


def _training(contests: Iterable[Contest], what: str) -> list[list[str]]:
    rows = [["", "tokens/s", "*ours*", "peak memory, MB", "*ours*"]]
    for one in contests:
        if one.what == what:
            for who in one.rounds:
                speed = _cells(one, who, "tokens_per_second")
                rows.append([who, *speed, *_cells(one, who, "peak_memory", 1e-6)])
    return rows


def _generation(contests: Iterable[Contest]) -> list[list[str]]:
    rows = [
        [
            "texts, and who",
            "tokens/s",
            "*ours*",
            "first token, ms",
            "*ours*",
            "from the start of Python, s",
            "*ours*",
            "peak memory, MB",
            "*ours*",
        ]
    ]
    for one in contests:
        if one.what != "generate":
            continue
        for who in one.rounds:
            row = [f"{one.texts}, {who}", *_cells(one, who, "tokens_per_second")]
            row += _cells(one, who, "ms_to_first_token")
            row += _cells(one, who, "seconds_from_start")
            rows.append([*row, *_cells(one, who, "peak_memory", 1e-6)])
    return rows


def _learning(contests: Iterable[Contest]) -> list[list[str]]:
    """The loss at the end of the same batches, and the time to the highest of these losses."""
    rows = [["", "nats a token, at the end", "seconds to the loss that all reach", "*ours*"]]
    for one in contests:
        if one.what != "learning":
            continue
        ends = {who: [r["curve"][-1][1] for r in rounds] for who, rounds in one.rounds.items()}
        target = max(max(losses) for losses in ends.values())
        reached = {
            who: Spread.of([_seconds_to(target, r["curve"]) for r in rounds])
            for who, rounds in one.rounds.items()
        }
        for who, spread in reached.items():
            ratio = spread.median / reached[US].median if US in reached else None
            ours = "" if ratio is None or who == US else f"{ratio:.2f}"
            loss = statistics.median(ends[who])
            rows.append([who, f"{loss:.4f}", spread_of(spread), ours])
    return rows


def _seconds_to(target: float, curve: Sequence[Sequence[float]]) -> float:
    """Seconds until a loss curve is at `target` for good, between its points in a straight line."""
    later = next(n for n in range(len(curve)) if all(loss <= target for _, loss in curve[n:]))
    if later == 0:
        return curve[0][0]
    (began, above), (ended, below) = curve[later - 1], curve[later]
    return float(np.interp(-target, [-above, -below], [began, ended]))


def _preparation(contests: Iterable[Contest]) -> list[list[str]]:
    rows = [["", "MB/s, the BPE's training included", "*ours*", "peak memory, MB", "*ours*"]]
    for one in contests:
        if one.what == "preparation":
            for who in one.rounds:
                speed = _cells(one, who, "megabytes_per_second")
                rows.append([who, *speed, *_cells(one, who, "peak_memory", 1e-6)])
    return rows


def _made_with(contests: Iterable[Contest]) -> list[list[str]]:
    told: dict[str, dict[str, Any]] = {}
    for one in contests:
        told |= one.made_with
    names = ("versions", "device", "threads", "BLAS", "compiler")
    return [["", *names], *([who, *(t.get(n, "") for n in names)] for who, t in told.items())]
