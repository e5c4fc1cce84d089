"""How much faster matrix products are with the BLAS that mlxgpt puts under MLX on Linux: a 1024³
product in float32, with it and without, in fresh processes of the same run.

    python benchmarks/matmul.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

MEASURE = """
import statistics, time
import mlx.core as mx
mx.set_default_device(mx.cpu)
a = mx.random.normal((1024, 1024))
mx.eval(a @ a)
times = []
for _ in range(7):
    start = time.perf_counter()
    mx.eval(a @ a)
    times.append(time.perf_counter() - start)
print(statistics.median(times))
"""


def median_seconds(before: str) -> float:
    command = [sys.executable, "-c", before + MEASURE]
    runs = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    return statistics.median(runs)


def main() -> None:
    shipped, ours = median_seconds(""), median_seconds("import mlxgpt\n")
    for name, seconds in (("as shipped", shipped), ("under mlxgpt", ours)):
        print(f"{name:14}{1000 * seconds:8.1f} ms{2 * 1024**3 / seconds / 1e9:8.1f} GFLOP/s")
    print(f"{'ratio':14}{shipped / ours:8.1f} ×")


if __name__ == "__main__":
    main()
