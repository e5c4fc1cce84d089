"""How often `mlxgpt compare --until-decided` takes chance for a difference, and how many seeds it
needs for one that is there: simulated, with the rule's own code.

python benchmarks/false_alarms.py [--simulations 10000]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np

from mlxgpt.experiments import sequential
from mlxgpt.experiments.statistics import ALPHA, confidence_interval

MOST = sequential.MAX_SEEDS
NOISE: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda draw, shape: draw.normal(size=shape),
    "heavy tails (t, 3 degrees)": lambda draw, shape: draw.standard_t(3, size=shape),
    "skewed (exponential)": lambda draw, shape: draw.exponential(size=shape),
    "one seed in ten far off": lambda draw, shape: (
        draw.normal(size=shape) * np.where(draw.random(shape) < 0.1, 5.0, 1.0)
    ),
}


def stopped(pairs: list[float], level: float, smallest: float) -> tuple[int, bool]:
    """After how many seeds the rule stops, and whether it then sees a difference."""
    for seeds in range(sequential.MIN_SEEDS, len(pairs) + 1):
        if sequential.is_decided(pairs[:seeds], level, smallest):
            break
    low, high = confidence_interval(pairs[:seeds], level)
    assert low is not None
    assert high is not None
    return seeds, not low <= 0 <= high


def family(
    draw: np.random.Generator, noise: Callable, variants: int, difference: float, smallest: float
) -> tuple[float, bool]:
    """One comparison of some variants with a first one; seeds of each, and whether any was seen to
    differ. The first one's noise is in all the differences.
    """
    results = noise(draw, (variants + 1, MOST))
    level = sequential.per_look_alpha(variants, MOST)
    ended = [stopped(list(row - results[0] + difference), level, smallest) for row in results[1:]]
    return sum(seeds for seeds, _ in ended) / variants, any(seen for _, seen in ended)


def error(share: float, count: int) -> float:
    """The standard error of a share of so many."""
    return math.sqrt(share * (1 - share) / count)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--simulations", type=int, default=10_000)
    count = parser.parse_args().simulations
    draw = np.random.default_rng(20261124)

    naive = 0
    for _ in range(count):
        pairs = list(draw.normal(size=MOST))
        looks = (
            confidence_interval(pairs[:n], ALPHA) for n in range(sequential.MIN_SEEDS, MOST + 1)
        )
        naive += any(not low <= 0 <= high for low, high in looks)  # type: ignore[operator]
    print(f"95 % intervals, looked at after each of {sequential.MIN_SEEDS} to {MOST} seeds:")
    print(f"  false alarms {naive / count:.4f} ± {error(naive / count, count):.4f}\n")

    print("the rule, no difference: false alarms among all variants, and seeds of each")
    for name, noise in NOISE.items():
        for variants in (1, 3):
            for smallest in (0.0, 0.5):
                found = [family(draw, noise, variants, 0.0, smallest) for _ in range(count)]
                share = sum(seen for _, seen in found) / count
                seeds = sum(seeds for seeds, _ in found) / count
                print(
                    f"  {name:28} {variants} variants  smallest {smallest}  {share:.4f} "
                    f"± {error(share, count):.4f}  {seeds:5.1f} seeds"
                )

    print("\nthe rule, one variant, a difference of so many standard deviations of a single result")
    for difference in (0.5, 1.0, 2.0, 4.0):
        found = [family(draw, NOISE["normal"], 1, difference, 0.0) for _ in range(count // 5)]
        share = sum(seen for _, seen in found) / len(found)
        seeds = sum(seeds for seeds, _ in found) / len(found)
        print(f"  {difference}  seen {share:.3f}  {seeds:5.1f} seeds")


if __name__ == "__main__":
    main()
