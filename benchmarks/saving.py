"""What saving a checkpoint costs a training that goes on meanwhile: stretches of steps with one
save at their beginning, in turn with stretches without, in one process.

    python benchmarks/saving.py [--tier 1] [--steps 25] [--pairs 8]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import mlxgpt  # before mlx
from mlxgpt import config as configs
from mlxgpt import config_files
from mlxgpt.machine import device
from mlxgpt.storage import run as runs
from mlxgpt.storage.run import Run
from mlxgpt.training.spike_guard import SpikeGuard
from mlxgpt.training.checkpointer import Saver
from mlxgpt.training.step import new_step
from mlxgpt.training.trainer import Hook, train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tier", type=int, default=1)
    parser.add_argument("--steps", type=int, default=25, help="of a stretch")
    parser.add_argument("--pairs", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        config = config_files.tier(given.tier)
        data = mlxgpt.prepare(
            "storybook", megabytes=2, tokenizer=config.data.tokenizer, data_dir=place / "data"
        )
        size = {"vocab_size": data.meta.vocab_size}
        config = device.resolve_dtype(configs.override(config, size))
        run = Run(place / "run", config, data.tokenizer, data.name, data.meta.fingerprint, True)
        runs.create(run)
        step, guard, done = new_step(config), SpikeGuard(), 0
        last = Hook(lambda n: n % given.steps == 0, lambda report: None)  # waits for the device
        waits: list[float] = []
        saved: list[tuple[int, float]] = []
        times: dict[bool, list[float]] = {False: [], True: []}
        with Saver(run, 2, lambda _, size, seconds: saved.append((size, seconds))) as saver:
            for n in range(2 * given.pairs + 2):
                saves, began, until = n % 2 == 1, time.perf_counter(), done + given.steps
                if saves:
                    saver.save(done, step, {}, guard.to_tree())
                    waits.append(time.perf_counter() - began)
                part = configs.override(config, {"max_steps": until, "decay_steps": 1 << 30})
                done = train(step, data.train, part, start=done, hooks=[last], guard=guard)
                saver.wait()
                if n > 1:  # the first two compile
                    times[saves].append(time.perf_counter() - began)
    with_, without = (statistics.median(times[saves]) for saves in (True, False))
    each, spread = with_ - without, statistics.stdev(times[False])
    interval = min(config.train.save_interval, config.train.eval_interval)
    written, seconds = saved[-1][0], statistics.median(s for _, s in saved)
    steps = f"{given.steps} steps"
    print(f"a checkpoint of {written / 1e6:.1f} MB, written in {seconds:.3f} s beside the training")
    print(f"the training waits for it: {1000 * statistics.median(waits):.1f} ms")
    print(f"{steps}: {without:.3f} s, with one save {with_:.3f} s (medians of stretches)")
    print(f"so a save takes {1000 * each:.0f} ms (stretches vary by ± {1000 * spread:.0f} ms)")
    share = each / (without / given.steps * interval)
    print(f"once in {interval} steps, as tier {given.tier} saves: {share:.2%} of the training")


if __name__ == "__main__":
    main()
