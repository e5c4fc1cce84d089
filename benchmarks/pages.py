"""How long the page of a very long run takes, and how large it is.

    python benchmarks/pages.py RUN

A copy of the run gets 100,000 records and 1,000 long samples; the page is made in a fresh process,
three times, beside a page of the run as it is.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECORDS = 100_000
ROUNDS = 3


def main(run: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        long, short = Path(name, "long"), Path(name, "short")
        for copy in (long, short):
            shutil.copytree(run, copy)
        lengthen(long)
        for _ in range(ROUNDS):
            for copy in (short, long):
                began = time.perf_counter()
                command = [sys.executable, "-m", "mlxgpt", "report", str(copy)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds = time.perf_counter() - began
                size = (copy / "report.html").stat().st_size
                print(f"{copy.name:6} {seconds:.2f} s, {size / 1e6:.2f} MB", flush=True)


def lengthen(run: Path) -> None:
    with (run / "metrics.jsonl").open("w") as file:
        for n in range(1, RECORDS + 1):
            numbers = {"loss": 3 + n % 7 / 7 - n / RECORDS, "tokens_per_second": 1e4 + n % 13}
            rest = {"lr": 1e-3, "grad_norm": n % 17, "peak_share": 0.3, "memory_bytes": 10**9}
            held_out = {"val_loss": 3 - n / RECORDS} if n % 100 == 0 else {}
            line = {"step": n, **numbers, **rest, "skipped": n // 20_000, **held_out}
            file.write(json.dumps(line) + "\n")
    with (run / "samples.txt").open("w") as file:
        for n in range(1000):
            file.write(f"--- step {100 * n}\n{'a long sample ' * 500}\n\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
