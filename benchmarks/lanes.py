"""What the second lane saves on a CPU: Tier 1's step on one thread and on two, in turn.

python benchmarks/lanes.py
"""

from __future__ import annotations

import statistics
import time

from mlxgpt import config_files

import mlxgpt  # isort: skip  (before mlx, so that both have the faster BLAS)
import mlx.core as mx

from mlxgpt import config
from mlxgpt.backend.cpu import parallel as lanes
from mlxgpt.model.gpt import GPT
from mlxgpt.training.step import TrainStep

REPEATS = 40


def main() -> None:
    print(mlxgpt.__version__, lanes.count(), "lanes here")
    tier = config.override(config_files.tier(1), {"dtype": "float32", "vocab_size": 65})
    ids = mx.random.randint(0, 65, (1, tier.train.batch_size, tier.model.block_size + 1))
    counts = sorted({1, lanes.count()})
    steps, times = {}, {count: list[float]() for count in counts}

    def use(count: int) -> None:
        lanes.count = lambda: count

    for count in counts:
        use(count)
        steps[count] = TrainStep(GPT(tier.model), tier)
    for _ in range(REPEATS):
        for count, step in steps.items():
            use(count)
            start = time.perf_counter()
            loss, norm = step(ids[..., :-1], ids[..., 1:], mx.array(1e-4), mx.random.key(0))
            mx.eval(loss, norm, step.state)
            times[count].append(1000 * (time.perf_counter() - start))
    for count, all_of_them in times.items():
        warm = all_of_them[3:]
        print(f"{count} lanes{statistics.median(warm):8.0f} ms a step (least {min(warm):.0f})")


if __name__ == "__main__":
    main()
