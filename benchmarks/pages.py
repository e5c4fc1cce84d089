"""Measure the time and size of the HTML report of a very long run.

    python benchmarks/pages.py RUN

Renders the reports of an unchanged copy of the run and of one with 100,000 records and 1,000 long
samples, alternately and three times each, in new processes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 3


def main(run: Path) -> None:
    """Measure and print one line per report."""
    with tempfile.TemporaryDirectory() as folder:
        long_run, short_run = Path(folder, "long"), Path(folder, "short")
        for run_copy in (long_run, short_run):
            shutil.copytree(run, run_copy)
        write_long_history(long_run)
        for _ in range(ROUNDS):
            for run_copy in (short_run, long_run):
                start = time.perf_counter()
                command = [sys.executable, "-m", "mlxgpt", "report", str(run_copy)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds = time.perf_counter() - start
                size = (run_copy / "report.html").stat().st_size
                print(f"{run_copy.name:6} {seconds:.2f} s, {size / 1e6:.2f} MB", flush=True)


RECORD_COUNT = 100_000


def write_long_history(run: Path) -> None:
    """Replace a run's metrics and samples with many synthetic ones."""
    with (run / "metrics.jsonl").open("w") as file:
        for n in range(1, RECORD_COUNT + 1):
            record = {
                "step": n,
                "loss": 3 + n % 7 / 7 - n / RECORD_COUNT,
                "tokens_per_second": 1e4 + n % 13,
                "lr": 1e-3,
                "grad_norm": n % 17,
                "peak_share": 0.3,
                "memory_bytes": 10**9,
                "skipped": n // 20_000,
            }
            if n % 100 == 0:
                record["val_loss"] = 3 - n / RECORD_COUNT
            file.write(json.dumps(record) + "\n")
    with (run / "samples.txt").open("w") as file:
        for n in range(1000):
            file.write(f"--- step {100 * n}\n{'a long sample ' * 500}\n\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
