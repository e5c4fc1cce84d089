"""The roofline (Williams et al., 2009): what a machine's peak and its memory's bandwidth allow each
workload, and what that reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlxgpt.reports.markdown import figure, table
from mlxgpt.reports.records import Measurement, Workload

HEAD = ("what", "FLOP a byte", "allowed, GFLOP/s", "by its", "reached, GFLOP/s", "share")
TOLD = (
    "What a machine allows is the smaller of its peak and of its bandwidth × operations for each",
    "byte; bytes and operations as counted for Metal, fused as there.",
)


def rooflines(rows: Sequence[list[str]]) -> list[str]:
    """The table of some rows, and what it says."""
    return [*TOLD, "", *table([list(HEAD), *rows], ">")]


def roofline(measurement: Measurement, prefix: str = "") -> Iterator[list[str]]:
    """Rows for `rooflines`; none where there is no bandwidth, or nothing was counted."""
    bandwidth = measurement.machine.bandwidth
    if not bandwidth:
        return
    for tier in measurement.tiers:
        peak, t, g = tier.training.matmul_peak, tier.training, tier.generation
        times = {
            "training step": t.tokens_per_step / t.tokens_per_second,
            "decoded token": 1 / g.tokens_per_second.median,
        }
        for one in tier.counted:
            if one.name not in times:
                continue
            reached = one.flops / times[one.name]
            allowed, by = allowed_of(one, peak, bandwidth)
            yield [
                f"{prefix}{tier.name}, {one.name}",
                figure(one.flops / one.bytes),
                figure(allowed / 1e9),
                by,
                figure(reached / 1e9),
                f"{100 * reached / allowed:.1f} %",
            ]


def allowed_of(workload: Workload, peak: float, bandwidth: float) -> tuple[float, str]:
    """Operations a second that a machine allows a workload, and by what they are bounded."""
    by_memory = bandwidth * workload.flops / workload.bytes
    return (peak, "peak") if peak <= by_memory else (by_memory, "bandwidth")
