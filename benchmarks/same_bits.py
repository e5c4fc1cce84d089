"""Whether two checkouts train to the same bits, and how fast each is, taking turns.

    python benchmarks/same_bits.py OLD NEW             # hashes of eight short runs
    python benchmarks/same_bits.py OLD NEW --rounds 9  # and the time of a step, on three shapes

OLD and NEW are folders of checkouts; both run in this Python. A hash is of the final parameters and
the optimizer's state; "values" takes -0.0 for +0.0. Where other programs use the processor as well,
believe the CPU time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 5  # of a round
SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32, "vocab_size": 65}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tier 1": ("classic", {"vocab_size": 65}),
    "tier 1 modern": ("modern", {"vocab_size": 65}),
    "small tier 2": (
        "classic",
        {"n_layer": 3, "n_embd": 288, "n_head": 4, "block_size": 256, "vocab_size": 2048}
        | {"batch_size": 4},
    ),
}


def make_step(recipe: str, changes: dict[str, Any]) -> Any:
    """A training step, and a function that takes the n-th of its steps."""
    from mlxgpt import config_files  # before mlx, so that its own BLAS serves MLX

    import mlx.core as mx  # isort: skip
    from mlxgpt.config import override
    from mlxgpt.training.step import new_step

    config = override(config_files.tier(1, recipe), {"dtype": "float32", **changes})
    step, train, model = new_step(config), config.train, config.model
    shape = train.gradient_accumulation_steps, train.batch_size, model.block_size + 1

    def take(n: int, limit: float = math.inf) -> None:
        ids = mx.random.randint(0, model.vocab_size, shape, key=mx.random.key(n))
        mx.eval(
            step(ids[..., :-1], ids[..., 1:], mx.array(1e-3), mx.random.key(n), limit), step.state
        )

    return step, take


def hashes(step: Any) -> dict[str, str]:
    """Of the bits, and of the values, of everything that a step changes."""
    import numpy as np

    found = {}
    for kind, zero in (("bits", None), ("values", 0)):
        digest = hashlib.sha256()
        for arrays in step.arrays():
            for name in sorted(arrays):
                array = np.array(arrays[name])
                digest.update(name.encode() + (array if zero is None else array + zero).tobytes())
        found[kind] = digest.hexdigest()[:16]
    return found


def worker() -> None:
    """Answer each line of standard input, a JSON list, with one of standard output."""
    steps: dict[str, Any] = {}
    for line in sys.stdin:
        name, recipe, changes, bad_step, count = json.loads(line)
        if name not in steps:
            steps[name] = make_step(recipe, changes)
        step, take = steps[name]
        began, cpu = time.perf_counter(), time.process_time()
        for n in range(count):
            take(n, -1.0 if n == bad_step else math.inf)
        answer = {
            "wall": 1000 * (time.perf_counter() - began) / count,
            "cpu": 1000 * (time.process_time() - cpu) / count,
            **hashes(step),
        }
        print(json.dumps(answer), flush=True)


class Checkout:
    """A process that trains with a checkout's code."""

    def __init__(self, folder: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(folder).resolve())},
        )

    def ask(self, *question: Any) -> dict[str, Any]:
        """The hashes after some steps, and the seconds of one."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="*", metavar="OLD NEW")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of steps to time")
    parser.add_argument("--worker", action="store_true")
    args = parser.parse_args()
    if args.worker:
        worker()
        return
    checkouts = [Checkout(folder) for folder in args.folders]
    for recipe in ("classic", "modern"):
        for parts, bad_step in ((1, None), (3, None), (1, 0), (1, 4)):
            changes = {**SMALL, "dropout": 0.1, "gradient_accumulation_steps": parts}
            name = f"{recipe}, {parts} micro-batches, skipped: {bad_step}"
            found = [one.ask(name, recipe, changes, bad_step, 8) for one in checkouts]
            for kind in ("bits", "values"):
                equal = "same" if len({one[kind] for one in found}) == 1 else "DIFFERENT"
                print(f"{name}: {kind} {equal}", *(one[kind] for one in found))
    for name, (recipe, changes) in SHAPES.items() if args.rounds else ():
        rounds = [
            [one.ask(name, recipe, changes, None, STEPS) for one in checkouts]
            for _ in range(args.rounds + 1)
        ][1:]  # the first one compiles
        for clock in ("wall", "cpu"):
            times = [[one[clock] for one in pair] for pair in rounds]
            old, new = (statistics.median(column) for column in zip(*times, strict=True))
            ratios = sorted(one / other for one, other in times)
            print(
                f"{name}: {clock} {old:.1f} ms -> {new:.1f} ms a step; old / new "
                f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
