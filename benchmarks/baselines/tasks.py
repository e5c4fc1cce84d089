"""The task that a process gets, its timing, and the memory it took. Imports no framework, so that a
process holds only the one it measures.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

Task = SimpleNamespace  # its fields: see runner.py
Result = dict[str, Any]
WARMUP = 2  # steps that compile every kernel


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    with suppress(OSError):
        high_water = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if high_water:
            return 1024 * int(high_water[1])
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def compiler() -> str:
    """The C++ compiler that kernels are compiled with."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["g++", "-dumpfullversion"]
        version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return f"g++ {version.strip()}"
    return "none"


def random_batch(task: Task) -> np.ndarray:
    """Ids [B, T + 1]; the speed of a step does not depend on them."""
    shape = task.batch_size, task.shape["block_size"] + 1
    return np.random.default_rng(0).integers(task.shape["vocab_size"], size=shape, dtype=np.int32)


def prompt_of(task: Task) -> np.ndarray:
    """A prompt's ids [T]; the speed of generation does not depend on them."""
    return np.arange(task.prompt_tokens) % task.shape["vocab_size"]


def timed_steps(task: Task, step: Callable[[], object]) -> Result:
    """Tokens per second of training steps that wait for their results."""
    for _ in range(WARMUP):
        step()
    began, taken = time.perf_counter(), 0
    while taken < 2 or time.perf_counter() - began < task.seconds:
        step()
        taken += 1
    seconds = (time.perf_counter() - began) / taken
    return {"tokens_per_second": task.batch_size * task.shape["block_size"] / seconds}


def timed_texts(task: Task, run: Callable[[], list[float]]) -> Result:
    """Times of a generation.

    Args:
        run: generates, and returns the time at which each row of new tokens was there. The first
            call gives the time from the start of Python to the first row, the second one, with
            everything warm, the time to the first row and the rate of the others.
    """
    first = run()
    started = time.time() - (time.perf_counter() - first[0]) - task.began
    began = time.perf_counter()
    times = run()
    return {
        "seconds_from_start": started,
        "ms_to_first_token": 1000 * (times[0] - began),
        "tokens_per_second": task.texts * (task.new_tokens - 1) / (times[-1] - times[0]),
    }


def learning_rates(task: Task) -> list[float]:
    """The learning rate of each step: linear warmup, then linear decay."""
    o, steps = task.config["optim"], task.steps
    warmup = max(1, steps // 10)
    return [
        o["learning_rate"] * min((n + 1) / warmup, (steps - n) / (steps - warmup + 1))
        for n in range(steps)
    ]


def loss_curve(
    task: Task, step: Callable[[np.ndarray], object], loss: Callable[[np.ndarray], float]
) -> Result:
    """Train on the batches in the task's folder; (seconds of training, loss on held-out windows)
    at 20 points. Evaluations and the first two steps, which compile, are not counted.
    """
    batches, windows = (np.load(f"{task.folder}/{name}.npy") for name in ("batches", "windows"))
    seconds, curve = 0.0, []
    for n, batch in enumerate(batches):
        began = time.perf_counter()
        step(batch)
        if n >= WARMUP:
            seconds += time.perf_counter() - began
        if (n + 1) % max(1, len(batches) // 20) == 0:
            curve.append((seconds, loss(windows)))
    return {"curve": curve}
