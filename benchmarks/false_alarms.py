"""Simulate the false positive rate of `mlxgpt compare --until-decided`, and the number of seeds it
needs to detect a difference.

python benchmarks/false_alarms.py [--simulations 10000]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np

from mlxgpt.experiments import sequential
from mlxgpt.experiments.sequential import MAX_SEEDS, MIN_SEEDS
from mlxgpt.experiments.statistics import ALPHA, confidence_interval

NoiseSampler = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def run_sequential_test(deltas: list[float], alpha: float, min_effect: float) -> tuple[int, bool]:
    """Number of seeds after which the test stops, and whether it then reports a difference."""
    for seeds in range(MIN_SEEDS, len(deltas) + 1):
        if sequential.is_decided(deltas[:seeds], alpha, min_effect):
            break
    low, high = confidence_interval(deltas[:seeds], alpha)
    assert low is not None
    assert high is not None
    return seeds, not low <= 0 <= high


def simulate_comparison(
    rng: np.random.Generator,
    sample_noise: NoiseSampler,
    variants: int,
    difference: float,
    min_effect: float,
) -> tuple[float, bool]:
    """Compare several variants with a baseline: returns the mean number of seeds per variant, and
    whether any was reported as different. All differences share the baseline's noise.
    """
    results = sample_noise(rng, (variants + 1, MAX_SEEDS))
    alpha = sequential.per_look_alpha(variants, MAX_SEEDS)
    outcomes = [
        run_sequential_test(list(row - results[0] + difference), alpha, min_effect)
        for row in results[1:]
    ]
    mean_seeds = sum(seeds for seeds, _ in outcomes) / variants
    return mean_seeds, any(is_different for _, is_different in outcomes)


def standard_error(rate: float, count: int) -> float:
    """Standard error of a rate estimated from `count` simulations."""
    return math.sqrt(rate * (1 - rate) / count)


NOISE_SAMPLERS: dict[str, NoiseSampler] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy tails (t, 3 degrees)": lambda rng, shape: rng.standard_t(3, size=shape),
    "skewed (exponential)": lambda rng, shape: rng.exponential(size=shape),
    "one seed in ten far off": lambda rng, shape: (
        rng.normal(size=shape) * np.where(rng.random(shape) < 0.1, 5.0, 1.0)
    ),
}


def main() -> None:
    """Run the simulations and print the rates."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--simulations", type=int, default=10_000)
    count = parser.parse_args().simulations
    rng = np.random.default_rng(20261124)

    false_alarms = 0
    for _ in range(count):
        deltas = list(rng.normal(size=MAX_SEEDS))
        intervals = (
            confidence_interval(deltas[:n], ALPHA) for n in range(MIN_SEEDS, MAX_SEEDS + 1)
        )
        false_alarms += any(
            not low <= 0 <= high  # type: ignore[operator]
            for low, high in intervals
        )
    rate = false_alarms / count
    print(f"95% intervals, checked after each of {MIN_SEEDS} to {MAX_SEEDS} seeds:")
    print(f"  false alarms {rate:.4f} ± {standard_error(rate, count):.4f}\n")

    print("the rule, no difference: false alarms among all variants, and seeds of each")
    for name, sample_noise in NOISE_SAMPLERS.items():
        for variants in (1, 3):
            for min_effect in (0.0, 0.5):
                comparisons = [
                    simulate_comparison(rng, sample_noise, variants, 0.0, min_effect)
                    for _ in range(count)
                ]
                mean_seeds, rate = np.mean(comparisons, axis=0)
                print(
                    f"  {name:28} {variants} variants  smallest {min_effect}  {rate:.4f} "
                    f"± {standard_error(rate, count):.4f}  {mean_seeds:5.1f} seeds"
                )

    print("\nthe rule, one variant; difference in standard deviations of a single result")
    for difference in (0.5, 1.0, 2.0, 4.0):
        comparisons = [
            simulate_comparison(rng, NOISE_SAMPLERS["normal"], 1, difference, 0.0)
            for _ in range(count // 5)
        ]
        mean_seeds, rate = np.mean(comparisons, axis=0)
        print(f"  {difference}  detected {rate:.3f}  {mean_seeds:5.1f} seeds")


if __name__ == "__main__":
    main()
