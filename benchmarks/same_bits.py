"""Compare two checkouts: weights of short runs, generated text, speed and peak memory.

    python benchmarks/same_bits.py OLD NEW             # hashes of four runs and their samples
    python benchmarks/same_bits.py OLD NEW --rounds 9  # also times, in alternating order

OLD and NEW are folders of checkouts; each runs its own copy of this file with this Python. Hashes
are of the final parameters and optimizer state ("values" treats -0.0 as +0.0), or of the samples.
Ratios are old / new, so above 1 the new checkout is faster; the lower bound is of the median, at
95% by the sign test. If other programs use the CPU as well, trust the CPU time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS_PER_ROUND = 5
TIMED_TOKENS = 100  # per sample
SAMPLE_COUNTS = (1, 8, 64)
SMALL_SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32}
SMALL_TIER_2_SHAPE = {"n_layer": 3, "n_embd": 288, "n_head": 4, "block_size": 256, "batch_size": 4}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tier 1": ("classic", {"vocab_size": 65}),
    "tier 1 modern": ("modern", {"vocab_size": 65}),
    "small tier 2": ("classic", {"vocab_size": 2048, **SMALL_TIER_2_SHAPE}),
}
COMMON_SETTINGS: dict[str, Any] = {"dtype": "float32", "source": "synthetic"}


class Worker:
    """Runs and times the code of the checkout that this process imports."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._steps: dict[str, Any] = {}
        self._models: dict[str, Any] = {}

    def train(self, name: str, recipe: str, changes: dict[str, Any]) -> dict[str, str]:
        """Train a short run, and return hashes of its last checkpoint."""
        import mlxgpt  # before mlx, so that MLX uses the BLAS it loads

        import mlx.core as mx  # isort: skip
        import numpy as np

        summary = mlxgpt.train(
            1,
            recipe=recipe,
            run=name,
            runs_dir=self._folder / "runs",
            data_dir=self._folder / "data",
            **COMMON_SETTINGS,
            **changes,
        )
        (newest,) = (summary.run / "checkpoints").glob(f"*{summary.step}")
        arrays: dict[str, mx.array] = {}
        for file in sorted(newest.glob("*.safetensors")):
            loaded: Any = mx.load(str(file))
            arrays |= {f"{file.stem}.{name}": value for name, value in loaded.items()}
        hashes = {}
        for kind, zero in (("bits", None), ("values", 0)):
            digest = hashlib.sha256()
            for key in sorted(arrays):
                array = np.array(arrays[key])
                digest.update(key.encode() + (array if zero is None else array + zero).tobytes())
            hashes[kind] = digest.hexdigest()[:16]
        return hashes

    def generate(self, name: str, samples: int, tokens: int) -> dict[str, Any]:
        """Hash of samples from a run's model, and milliseconds per token."""
        import mlxgpt

        import mlx.core as mx  # isort: skip

        if name not in self._models:
            self._models[name] = mlxgpt.load(name, runs_dir=self._folder / "runs")
        mx.reset_peak_memory()
        clock = Clock()
        output = self._models[name].generate("The ", samples=samples, max_tokens=tokens, seed=1)
        return {
            "texts": hashlib.sha256(str(output.texts).encode()).hexdigest()[:16],
            **clock(tokens),
        }

    def time_step(self, name: str) -> dict[str, Any]:
        """Milliseconds per training step."""
        from mlxgpt.config import toml

        import mlx.core as mx  # isort: skip
        from mlxgpt.config import override_config
        from mlxgpt.data.token_array import Batch
        from mlxgpt.training.step import make_train_step

        recipe, changes = SHAPES[name]
        config = override_config(toml.load_tier_config(1, recipe), {**COMMON_SETTINGS, **changes})
        step = self._steps.setdefault(name, make_train_step(config))
        train, model = config.train, config.model
        shape = train.gradient_accumulation_steps, train.batch_size, model.block_size + 1
        mx.reset_peak_memory()
        clock = Clock()
        for n in range(STEPS_PER_ROUND):
            ids = mx.random.randint(0, model.vocab_size, shape, key=mx.random.key(n))
            batch = Batch(ids[..., :-1], ids[..., 1:])
            outputs = step(batch, mx.array(1e-3), mx.random.key(n), float("inf"))
            mx.eval(outputs, step.state)
        return clock(STEPS_PER_ROUND)


class Clock:
    """Measures wall time, CPU time and peak memory since it was created."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __call__(self, times: int) -> dict[str, float]:
        """Milliseconds per repetition of `times` repetitions, and peak memory in MB."""
        import mlx.core as mx

        return {
            "wall": 1000 * (time.perf_counter() - self._wall) / times,
            "cpu": 1000 * (time.process_time() - self._cpu) / times,
            "peak": mx.get_peak_memory() / 1e6,
        }


class Checkout:
    """A child process that runs the code of a checkout."""

    def __init__(self, folder: str, scratch: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(folder, "benchmarks", "same_bits.py")), "--worker", scratch],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(folder).resolve())},
        )

    def ask(self, *question: Any) -> dict[str, Any]:
        """Call a method of the process's Worker, given as (name, *arguments)."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def lower_bound(ratios: list[float]) -> float:
    """One-sided 95% lower bound of the median (sign test): the k-th smallest of n ratios."""
    n, k, tail = len(ratios), 0, 0.5 ** len(ratios)
    total = tail
    while total <= 0.05:
        k += 1
        tail *= (n - k + 1) / k
        total += tail
    return sorted(ratios)[max(0, k - 1)]


def compare_times(name: str, rounds: int, checkouts: list[Checkout], *question: Any) -> None:
    """Time the checkouts in alternating order, and print the medians."""
    answers = []
    for n in range(rounds + 1):
        order = 1 if n % 2 else -1
        answers.append([checkout.ask(*question) for checkout in checkouts[::order]][::order])
    del answers[0]  # the first round compiles
    for clock in ("wall", "cpu", "peak"):
        pairs = [[answer[clock] for answer in pair] for pair in answers]
        old, new = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = [old_value / new_value for old_value, new_value in pairs]
        print(
            f"{name}: {clock} {old:.2f} -> {new:.2f}; old / new {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f}-{max(ratios):.3f}), lower bound {lower_bound(ratios):.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="*", metavar="OLD NEW")
    parser.add_argument("--rounds", type=int, default=0, help="rounds to time")
    parser.add_argument("--worker", metavar="FOLDER")
    args = parser.parse_args()
    if args.worker:
        worker = Worker(args.worker)
        for line in sys.stdin:
            method, *arguments = json.loads(line)
            print(json.dumps(getattr(worker, method)(*arguments)), flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        checkouts = []
        for n, folder in enumerate(args.folders):
            (Path(scratch) / str(n)).mkdir()
            checkouts.append(Checkout(folder, str(Path(scratch) / str(n))))

        def show(name: str, kinds: tuple[str, ...], *question: Any) -> None:
            answers = [checkout.ask(*question) for checkout in checkouts]
            for kind in kinds:
                equal = "same" if len({answer[kind] for answer in answers}) == 1 else "DIFFERENT"
                print(f"{name}: {kind} {equal}", *(answer[kind] for answer in answers), flush=True)

        for recipe in ("classic", "modern"):
            for parts in (1, 3):
                name = f"{recipe}-{parts}"
                changes = {**SMALL_SHAPE, "dropout": 0.1, "gradient_accumulation_steps": parts}
                changes |= {"max_steps": 8, "batch_size": 8}
                show(name, ("bits", "values"), "train", name, recipe, changes)
                for samples in SAMPLE_COUNTS:
                    show(f"{name}, {samples} texts", ("texts",), "generate", name, samples, 50)
        if not args.rounds:
            return
        for name in SHAPES:
            compare_times(f"{name}, step", args.rounds, checkouts, "time_step", name)
        timed: dict[str, dict[str, Any]] = {
            "tier-1": {},
            "tier-2": {**SMALL_TIER_2_SHAPE, "tokenizer": "bpe"},
        }
        for name, shape in timed.items():
            changes = {**shape, "max_steps": 2, "warmup_steps": 1}
            show(name, ("values",), "train", name, "classic", changes)
            for samples in SAMPLE_COUNTS:
                question = "generate", name, samples, TIMED_TOKENS
                compare_times(f"{name}, {samples} texts", args.rounds, checkouts, *question)


if __name__ == "__main__":
    main()
