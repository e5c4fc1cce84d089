"""Apple chips and their *estimated* speed, from FLOPs and published measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxgpt.bench.markdown import format_number, format_seconds, render_markdown_table
from mlxgpt.bench.records import TierResult


@dataclass(frozen=True)
class Chip:
    """An Apple chip: float32 peak and memory bandwidth (two if there are two versions, none if we
    have no source).
    """

    name: str
    tflops: float
    gb_per_second: tuple[int, ...]


# TFLOPS and GB/s of base, Pro, Max and Ultra, from spec sheets and published peak measurements.
APPLE_SPECS = {
    "M1": ((2.6, 5.2, 10.4, 21), ((68,), (200,), (400,), (800,))),
    "M2": ((3.6, 6.8, 13.5, 27.2), ((102,), (205,), (400,), (800,))),
    "M3": ((4.1, 7.4, 14.2, 28.4), ((102,), (150,), (300, 400), (819,))),
    "M4": ((4.6, 9.2, 18.4), ((120,), (273,), (410, 546))),
    "M5": ((5.7, 11.4, 22.8), ((), (), ())),
}
CHIPS = tuple(
    Chip(family + suffix, tflops, bandwidths)
    for family, specs in APPLE_SPECS.items()
    for suffix, tflops, bandwidths in zip(("", " Pro", " Max", " Ultra"), *specs, strict=False)
)

ESTIMATED_MFU = 0.25  # share of the peak in published measurements of small models


def estimate_training_speed(chip: Chip, tier: TierResult) -> float:
    """*Estimated* training speed in tokens per second."""
    return ESTIMATED_MFU * 1e12 * chip.tflops / tier.training.flops_per_token


def max_generation_speed(chip: Chip, tier: TierResult) -> tuple[float, ...]:
    """Upper bound of the generation speed in tokens per second, for each bandwidth of the chip."""
    return tuple(
        1e9 * bandwidth / tier.generation.bytes_per_token for bandwidth in chip.gb_per_second
    )


MIN_MEASURED_PARAMETERS = 3_500_000  # smallest model in those measurements


def render_chip_estimates(tiers: Sequence[TierResult]) -> list[str]:
    """Render the report's section on Apple chips."""
    lines = [
        "## Apple chips: *estimated*",
        "",
        "None of this was measured with mlxgpt. Training is *estimated* at "
        f"{100 * ESTIMATED_MFU:.0f}% of the float32 peak:",
        "published measurements report 24% (3.5M parameters, M3 Air) and 25% (15.7M, M4 Max) for",
        "small models, and 31% to 43% for a 154M model with MLX on M1 Pro to M1 Ultra.",
        "*Whole run*: all steps of the config, without evaluations. Generation is an upper bound:",
        "memory bandwidth divided by the bytes read per token. Small models do not reach it:",
        "launching the kernels takes longer than reading the weights.",
    ]
    for tier in tiers:
        lines += ["", f"### {tier.name}, *estimated*", ""]
        if tier.parameters < MIN_MEASURED_PARAMETERS:
            lines += ["This model is smaller than any of those measured; expect less.", ""]
        lines += render_markdown_table(
            [list(ESTIMATE_COLUMNS), *(_estimate_row(chip, tier) for chip in CHIPS)], ">"
        )
    return [*lines, ""]


ESTIMATE_COLUMNS = (
    "chip",
    "peak, TFLOPS",
    "memory, GB/s",
    "*estimated* tokens/s",
    "*estimated* whole run",
    "*estimated* generation, upper bound",
)


def _estimate_row(chip: Chip, tier: TierResult) -> list[str]:
    rate = estimate_training_speed(chip, tier)
    return [
        chip.name,
        f"{chip.tflops:.1f}",
        " to ".join(f"{bandwidth}" for bandwidth in chip.gb_per_second) or "–",
        format_number(rate, 2),
        format_seconds(tier.training.plan_tokens / rate),
        " to ".join(format_number(limit, 2) for limit in max_generation_speed(chip, tier)) or "–",
    ]
