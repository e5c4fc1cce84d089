"""What fused kernels are worth on a CPU: a step of Tier 1 with a C++ compiler and without.

python benchmarks/compiler.py      medians of five alternating processes each, and their range

With none in the PATH, MLX computes one operation after the other, as on a machine that has none.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPEATS = 5
STEPS = """
from mlxgpt import config_files
from mlxgpt import config
from mlxgpt.reports import bench
from mlxgpt.backend.cpu import jit as compiler
measured = bench.measure_training(bench.complete(config_files.tier(1)), bench.Plan(repeats=3))
print(measured.ms_per_step.median, compiler.status() is None)
"""


def milliseconds(path: str, fused: bool) -> float:
    """A step's median time in a fresh process."""
    result = subprocess.run(
        [sys.executable, "-c", STEPS],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    found, compiled = result.stdout.split()
    assert (compiled == "True") == fused
    return float(found)


def main() -> None:
    with tempfile.TemporaryDirectory() as empty:
        Path(empty, "sh").symlink_to("/bin/sh")
        cases = {"with g++": (os.environ["PATH"], True), "without": (empty, False)}
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(REPEATS):
            for name, (path, fused) in cases.items():
                times[name].append(milliseconds(path, fused))
    for name, found in times.items():
        middle = statistics.median(found)
        print(f"{name:10}{middle:7.0f} ms   ({min(found):.0f} to {max(found):.0f})")
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    print(
        f"ratio     {statistics.median(ratios):7.2f}      ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
