"""What it costs in loss to average less between machines: gradients added up in 16 bits, or weights
averaged every so many steps only; beside gradients averaged in 32 bits at every step.

    python benchmarks/averaging.py TEXT [--steps 400] [--seeds 5] [--ranks 4]

A classic of 2 layers of width 192 on stories. One process computes every rank's share in turn, with
the arithmetic that the ranks would have. What the ways bring in time is for `links.py` of the
reports to say.
"""

from __future__ import annotations

import mlxgpt  # isort: skip  (before mlx, so that it has the faster BLAS)
import argparse
import math
import statistics
from collections.abc import Callable
from functools import reduce
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlxgpt import config_files
from mlxgpt.config import Config, override
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.evaluation.loss import Evaluator
from mlxgpt.machine import device
from mlxgpt.model.gpt import GPT
from mlxgpt.training.step import TrainStep
from mlxgpt.training.trainer import train

SIZE: dict[str, Any] = {"n_layer": 2, "n_embd": 192, "n_head": 3, "vocab_size": 2048}
PLAN: dict[str, Any] = {"batch_size": 8, "learning_rate": 1.5e-3, "warmup_steps": 50}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    given = parser.parse_args()
    data = mlxgpt.prepare(given.text, tokenizer="bpe", vocab_size=SIZE["vocab_size"])
    classic = override(config_files.tier(2), {**SIZE, **PLAN, "max_steps": given.steps})
    losses: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed in range(given.seeds):
        for name, (rate, way) in WAYS.items():
            changes = {"seed": seed, "learning_rate": rate * PLAN["learning_rate"]}
            config = device.resolve_dtype(override(classic, changes))
            step = way(config, given.ranks)
            train(step, data.train, config)
            losses[name].append(held_out(step.model, data, config))
            print(f"seed {seed}, {name}: {losses[name][-1]:.4f}", flush=True)
    print("\n".join(table(losses)))


def held_out(model: GPT, data: Dataset, config: Config) -> float:
    """Nats a token of the validation text."""
    evaluator = Evaluator(
        model,
        data.tokenizer,
        data.val,
        bos=None,
        batch_size=config.train.batch_size,
        dtype=getattr(mx, config.train.dtype),
    )
    return evaluator().loss


class Shared(TrainStep):
    """A step whose gradients are those of so many shares of the batch, added up in a dtype."""

    def __init__(self, config: Config, ranks: int, dtype: mx.Dtype) -> None:
        super().__init__(GPT(config.model, config.train.seed), config)
        self.shares, self.summed_in = ranks, dtype

    def gradients(
        self, inputs: mx.array, targets: mx.array, key: mx.array
    ) -> tuple[mx.array, dict]:
        found = []
        for rows in shares(inputs, targets, key, self.shares):
            own = super().gradients(*rows)
            found.append(tree_map(lambda array: array.astype(self.summed_in), own))
            mx.eval(found)
        total = reduce(lambda one, other: tree_map(mx.add, one, other), found)
        return tree_map(lambda array: array.astype(mx.float32) / self.shares, total)


class LessOften(TrainStep):
    """Ranks that each train on their share by themselves, and average their weights and moments
    every so many steps, and after the last.
    """

    def __init__(self, config: Config, ranks: int, every: int) -> None:
        super().__init__(GPT(config.model, config.train.seed), config)
        others = (GPT(config.model, config.train.seed) for _ in range(ranks - 1))
        self.ranks_steps = [self, *(TrainStep(model, config) for model in others)]
        self.every, self.done, self.last = every, 0, config.train.max_steps

    def __call__(
        self,
        inputs: mx.array,
        targets: mx.array,
        learning_rate: mx.array,
        key: mx.array,
        limit: float = math.inf,
    ) -> tuple[mx.array, mx.array]:
        parts = shares(inputs, targets, key, len(self.ranks_steps))
        found = []
        for step, (rows, their, own) in zip(self.ranks_steps, parts, strict=True):
            found.append(TrainStep.__call__(step, rows, their, learning_rate, own, limit))
            mx.eval(step.state)
        self.done += 1
        if self.done % self.every == 0 or self.done == self.last:
            arrays = [step.arrays() for step in self.ranks_steps]
            mean = tree_map(lambda *values: mean_of(values), *arrays)
            mx.eval(mean)
            for step in self.ranks_steps:
                step.restore(*mean)
        losses, norms = zip(*found, strict=True)
        return mean_of(losses), mean_of(norms)


def mean_of(values: tuple[mx.array, ...]) -> mx.array:
    """The mean; of counters, which are equal everywhere, the first."""
    if mx.issubdtype(values[0].dtype, mx.floating):
        return sum(values[1:], values[0]) / len(values)
    return values[0]


def shares(
    inputs: mx.array, targets: mx.array, key: mx.array, ranks: int
) -> list[tuple[mx.array, mx.array, mx.array]]:
    """Each rank's rows of a batch [1, B, T], and a key for its dropout."""
    keys = mx.random.split(key, ranks)
    cut = (mx.split(ids, ranks, axis=1) for ids in (inputs, targets))
    return list(zip(*cut, keys, strict=True))


def every(steps: int) -> Callable[[Config, int], TrainStep]:
    return lambda config, ranks: LessOften(config, ranks, steps)


# Each with how many times the learning rate: fewer rows at a time are noisier, which makes AdamW's
# steps shorter.
WAYS: dict[str, tuple[float, Callable[[Config, int], TrainStep]]] = {
    "each step, 32 bits": (1.0, lambda config, ranks: Shared(config, ranks, mx.float32)),
    "each step, 16 bits": (1.0, lambda config, ranks: Shared(config, ranks, mx.bfloat16)),
    "every 4 steps": (1.0, every(4)),
    "every 4 steps, twice the rate": (2.0, every(4)),
    "every 16 steps": (1.0, every(16)),
    "every 16 steps, twice the rate": (2.0, every(16)),
}


def table(losses: dict[str, list[float]]) -> list[str]:
    """Means, and how far each is from the first, seed by seed, with the standard error of that."""
    first = next(iter(losses.values()))
    lines = ["| averaged | validation loss | beside the first, seed by seed |", "|---|---|---|"]
    for name, of_it in losses.items():
        differences = [one - other for one, other in zip(of_it, first, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        told = f"{statistics.mean(differences):+.4f} ± {error:.4f}" if of_it is not first else ""
        lines.append(f"| {name} | {statistics.mean(of_it):.4f} | {told} |")
    return lines


if __name__ == "__main__":
    main()
