"""How long a person waits: `mlxgpt --help`, and `mlxgpt generate` to its first character.

python benchmarks/startup.py RUN      a run's folder; medians of seven after one warm-up
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

REPEATS = 7


def first_byte(command: list[str]) -> float:
    """Seconds from the start of a command to its first byte beyond the prompt's own."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


def main() -> None:
    module = [sys.executable, "-m", "mlxgpt"]
    cases = {
        "python -c pass": [sys.executable, "-c", "print()"],
        "mlxgpt --help": [*module, "--help"],
        "first character": [*module, "generate", "--run", sys.argv[1], "--max-tokens", "50"],
    }
    for name, command in cases.items():
        first_byte(command)
        times = [first_byte(command) for _ in range(REPEATS)]
        low, middle, high = min(times), statistics.median(times), max(times)
        print(f"{name:18}{middle:7.3f} s   ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
