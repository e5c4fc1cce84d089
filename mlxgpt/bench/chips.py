"""Apple's chips, and their *estimated* speed, from FLOPs and public measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxgpt.bench.markdown import figure, table, time_of
from mlxgpt.bench.records import Tier


@dataclass(frozen=True)
class Chip:
    """An Apple chip's float32 peak, and its memory's bandwidth: two if there are two versions, none
    where we have no source.
    """

    name: str
    tflops: float
    gb_per_second: tuple[int, ...]


# From public spec sheets, and from measurements of the peak: base, Pro, Max, Ultra.
APPLE = {
    "M1": ((2.6, 5.2, 10.4, 21), ((68,), (200,), (400,), (800,))),
    "M2": ((3.6, 6.8, 13.5, 27.2), ((102,), (205,), (400,), (800,))),
    "M3": ((4.1, 7.4, 14.2, 28.4), ((102,), (150,), (300, 400), (819,))),
    "M4": ((4.6, 9.2, 18.4), ((120,), (273,), (410, 546))),
    "M5": ((5.7, 11.4, 22.8), ((), (), ())),
}
CHIPS = tuple(
    Chip(family + kind, tflops, speeds)
    for family, numbers in APPLE.items()
    for kind, tflops, speeds in zip(("", " Pro", " Max", " Ultra"), *numbers, strict=False)
)

# The share of that peak which public measurements of small trainings reached: see `estimates`.
PEAK_SHARE = 0.25
SMALLEST_MEASURED = 3_500_000


def estimated_training(chip: Chip, tier: Tier) -> float:
    """Tokens per second in training, *estimated*."""
    return PEAK_SHARE * 1e12 * chip.tflops / tier.training.flops_per_token


def max_generation(chip: Chip, tier: Tier) -> tuple[float, ...]:
    """Tokens per second in generation that a chip cannot exceed; one for each bandwidth."""
    return tuple(1e9 * speed / tier.generation.bytes_per_token for speed in chip.gb_per_second)


def estimates(tiers: Sequence[Tier]) -> list[str]:
    """The report's section on Apple's chips."""
    lines = [
        "## Apple chips: *estimated*",
        "",
        "Nothing here was measured with mlxgpt. Training is *estimated* at "
        f"{100 * PEAK_SHARE:.0f}% of the float32 peak:",
        "public measurements of small models found 24% (3.5M parameters, M3 Air) and 25% (15.7M,",
        "M4 Max), and of one of 154M, with MLX on M1 Pro to Ultra, 31% to 43%. *Whole run*: all",
        "steps of the config, without evaluations. Generation is *estimated* at most: the memory's",
        "bandwidth over the bytes that a token reads. Small models never reach that: launching the",
        "kernels takes longer than reading the weights.",
    ]
    for tier in tiers:
        lines += ["", f"### {tier.name}, *estimated*", ""]
        if tier.parameters < SMALLEST_MEASURED:
            lines += ["Smaller than any model in those measurements: expect less.", ""]
        lines += table([list(HEAD), *(_row(chip, tier) for chip in CHIPS)], ">")
    return [*lines, ""]


HEAD = (
    "chip",
    "peak, TFLOPS",
    "memory, GB/s",
    "*estimated* tokens/s",
    "*estimated* whole run",
    "*estimated* generation, at most",
)


def _row(chip: Chip, tier: Tier) -> list[str]:
    rate = estimated_training(chip, tier)
    return [
        chip.name,
        f"{chip.tflops:.1f}",
        " to ".join(f"{speed}" for speed in chip.gb_per_second) or "–",
        figure(rate, 2),
        time_of(tier.training.plan_tokens / rate),
        " to ".join(figure(limit, 2) for limit in max_generation(chip, tier)) or "–",
    ]
