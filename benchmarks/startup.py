"""Measure startup time: `mlxgpt --help`, and `mlxgpt generate` to its first character.

python benchmarks/startup.py RUN      RUN is a run's folder; prints medians of 7 after one warmup
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def time_to_first_byte(command: list[str]) -> float:
    """Seconds from the start of a command to its first byte of standard output."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


REPEATS = 7


def main() -> None:
    """Measure and print one line per command."""
    mlxgpt_command = [sys.executable, "-m", "mlxgpt"]
    commands = {
        "python -c pass": [sys.executable, "-c", "print()"],
        "mlxgpt --help": [*mlxgpt_command, "--help"],
        "first character": [
            *mlxgpt_command,
            "generate",
            "--run",
            sys.argv[1],
            "--max-tokens",
            "50",
        ],
    }
    for name, command in commands.items():
        time_to_first_byte(command)
        times = [time_to_first_byte(command) for _ in range(REPEATS)]
        low, median, high = min(times), statistics.median(times), max(times)
        print(f"{name:18}{median:7.3f} s   ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
