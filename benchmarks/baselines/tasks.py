"""Helpers for a process that runs one task: inputs, timing and peak memory. Imports no framework,
so that a process loads only the one that it measures.
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

Task = SimpleNamespace  # for its fields see runner.py
Result = dict[str, Any]
WARMUP_STEPS = 2  # steps that compile every kernel


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    with suppress(OSError):
        match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if match:
            return 1024 * int(match[1])
    import resource

    max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max_rss if sys.platform == "darwin" else 1024 * max_rss


def compiler_version() -> str:
    """Name and version of the C++ compiler."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["g++", "-dumpfullversion"]
        version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return f"g++ {version.strip()}"
    return "none"


def make_random_batch(task: Task) -> np.ndarray:
    """Random ids [B, T + 1]; the speed of a step does not depend on them."""
    shape = task.batch_size, task.shape["block_size"] + 1
    return np.random.default_rng(0).integers(task.shape["vocab_size"], size=shape, dtype=np.int32)


def make_prompt(task: Task) -> np.ndarray:
    """A prompt's ids [T]; the speed of generation does not depend on them."""
    return np.arange(task.prompt_tokens) % task.shape["vocab_size"]


def time_training(task: Task, step: Callable[[], object]) -> Result:
    """Tokens per second of training; `step` must wait for its result."""
    for _ in range(WARMUP_STEPS):
        step()
    start, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - start < task.seconds:
        step()
        steps += 1
    seconds = (time.perf_counter() - start) / steps
    return {"tokens_per_second": task.batch_size * task.shape["block_size"] / seconds}


def time_generation(task: Task, run: Callable[[], list[float]]) -> Result:
    """Startup time, time to the first token, and tokens per second of generation.

    Args:
        run: generates, and returns the time at which each row of new tokens was complete. The first
            call measures the time from the start of Python to the first row; the second call, after
            this warmup, the time to the first row and the speed of the other rows.
    """
    cold_times = run()
    seconds_from_start = time.time() - (time.perf_counter() - cold_times[0]) - task.began
    start = time.perf_counter()
    times = run()
    return {
        "seconds_from_start": seconds_from_start,
        "ms_to_first_token": 1000 * (times[0] - start),
        "tokens_per_second": task.texts * (task.new_tokens - 1) / (times[-1] - times[0]),
    }


def learning_rates(task: Task) -> list[float]:
    """The learning rate of each step: linear warmup, then linear decay."""
    max_rate, steps = task.config["optim"]["learning_rate"], task.steps
    warmup = max(1, steps // 10)
    return [
        max_rate * min((n + 1) / warmup, (steps - n) / (steps - warmup + 1)) for n in range(steps)
    ]


def measure_loss_curve(
    task: Task, step: Callable[[np.ndarray], object], evaluate: Callable[[np.ndarray], float]
) -> Result:
    """Train on the batches in the task's folder, and measure (seconds of training, held-out loss)
    at 20 points. The time excludes evaluations and the first two steps, which compile kernels.
    """
    batches, windows = (np.load(f"{task.folder}/{name}.npy") for name in ("batches", "windows"))
    seconds, curve = 0.0, []
    for n, batch in enumerate(batches):
        start = time.perf_counter()
        step(batch)
        if n >= WARMUP_STEPS:
            seconds += time.perf_counter() - start
        if (n + 1) % max(1, len(batches) // 20) == 0:
            curve.append((seconds, evaluate(windows)))
    return {"curve": curve}
