"""Measurements of machines as a page: rooflines, speeds beside what is predicted, and rivals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlxgpt.pages import plots
from mlxgpt.pages.page import Figure, Page
from mlxgpt.reports import report, several
from mlxgpt.reports.chips import CHIPS, predicted_training
from mlxgpt.reports.records import Measurement
from mlxgpt.rivals.record import US, Contest


def page_of(measurements: Sequence[Measurement]) -> Page:
    """A page on one machine, or on several side by side."""
    chips = ", ".join(one.machine.chip for one in measurements)
    page = Page(f"Measured on {chips}")
    _speeds(page, measurements)
    _rooflines(page, measurements)
    for measurement in measurements:
        _rivals(page, measurement)
    alone = len(measurements) == 1
    page.markdown(report.markdown(measurements[0]) if alone else several.markdown(measurements))
    return page


def _speeds(page: Page, measurements: Sequence[Measurement]) -> None:
    page.heading("Training, measured and predicted")
    for tier in measurements[0].tiers:
        measured = [
            (f"{one.machine.chip}, {one.date[:10]}", t.training.tokens_per_second, True)
            for one in measurements
            for t in one.tiers
            if t.name == tier.name
        ]
        rows = [*measured, *((c.name, predicted_training(c, tier), False) for c in CHIPS)]
        label = "tokens a second in training, logarithmic"
        svg = plots.points(rows, label, name=f"speed of {tier.name}")
        caption = f"{tier.name}: filled was measured, hollow is predicted, and measured by nobody."
        told = "; ".join(f"{name}: {value:,.0f}" for name, value, _ in measured)
        slowest, fastest = rows[len(measured)], max(rows[len(measured) :], key=lambda row: row[1])
        seen = (
            f"{tier.name}, tokens a second in training. Measured, {told}. Predicted, from "
            f"{slowest[1]:,.0f} on an {slowest[0]} to {fastest[1]:,.0f} on an {fastest[0]}"
        )
        page.figure(Figure(svg, caption, seen))


def _rooflines(page: Page, measurements: Sequence[Measurement]) -> None:
    roofs, points = [], []
    for number, one in enumerate(measurements, start=1):
        of = f"{number}: " if len(measurements) > 1 else ""
        if band := one.machine.bandwidth:
            peak = max(tier.training.matmul_peak for tier in one.tiers)
            roofs.append((f"{of}what {one.machine.chip} allows", peak, band))
            points += [(of + name, intensity, reached) for name, intensity, reached in _points(one)]
    if not points:
        return
    page.heading("Roofline")
    svg = plots.roofline(roofs, points, name="roofline")
    caption = (
        "What a machine allows, by its memory's bandwidth (the slope) and its peak (the flat "
        "part), and what was reached below it; both axes are logarithmic."
    )
    told = "; ".join(f"{name} reaches {reached / 1e9:,.1f} GFLOP/s" for name, _, reached in points)
    page.figure(Figure(svg, caption, f"A roofline: {told}"))


def _points(measurement: Measurement) -> Iterator[tuple[str, float, float]]:
    """(name, operations a byte, operations a second) of each workload that was timed."""
    for tier in measurement.tiers:
        t, g = tier.training, tier.generation
        seconds = {
            "training step": t.tokens_per_step / t.tokens_per_second,
            "decoded token": 1 / g.tokens_per_second.median,
        }
        for one in tier.counted:
            if one.name in seconds:
                yield (
                    f"{tier.name}, {one.name}",
                    one.flops / one.bytes,
                    one.flops / seconds[one.name],
                )


def _rivals(page: Page, measurement: Measurement) -> None:
    rows = [row for contest in measurement.contests for row in ratios(contest)]
    if not rows:
        return
    page.heading(f"Beside others, on {measurement.machine.chip}")
    label = "how many times as fast we are, logarithmic"
    svg = plots.intervals(rows, label, name=measurement.date, middle=1.0, log=True)
    told = "; ".join(f"{name}: {ratio:.2f}" for name, ratio, *_ in rows)
    caption = "Our median tokens a second over theirs, and what the rounds allow at the most."
    page.figure(Figure(svg, caption, f"How many times as fast we are. {told}"))


def ratios(contest: Contest) -> Iterator[tuple[str, float, float, float]]:
    """(what and who, how many times as fast we are, at least, at most) of each rival."""

    def speeds(who: str) -> list[float]:
        return sorted(one.get("tokens_per_second", 0.0) for one in contest.rounds.get(who, []))

    ours = speeds(US)
    of = contest.what if contest.what != "generate" else f"{contest.texts} text"
    what = f"{contest.config}, {of}{'s' * (contest.texts > 1)}"
    for who in contest.rounds:
        theirs = speeds(who)
        if who != US and ours and min(*ours, *theirs) > 0:
            middle = ours[len(ours) // 2] / theirs[len(theirs) // 2]
            yield f"{what}: {who}", middle, ours[0] / theirs[-1], ours[-1] / theirs[0]
