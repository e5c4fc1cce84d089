"""Where mac_report.py tries things out: a folder that goes when all is done, the commands that are
run in it, one of them killed on purpose, and how far two trainings are apart.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt import config_files
from mlxgpt.config import Config
from mlxgpt.errors import UserError
from mlxgpt.reports import bench
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.storage.run import Run

ROOT = Path(__file__).resolve().parents[1]
FEWEST_STEPS = 20

# `mlxgpt`, and after what it prints a line with the most memory that it had.
MLXGPT = """
import sys
from mlxgpt import cli
from mlxgpt.machine import device
code = cli.main(sys.argv[1:])
print(device.peak_bytes())
sys.exit(code)
"""


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        configs: whose speed is measured.
        tests: arguments for pytest.
        train: what is trained; `first_steps`: at first, to know how long a step takes; `seconds`:
            of each training after that.
        limit: seconds that any command may take.
    """

    configs: Mapping[str, Config] = field(
        default_factory=lambda: {f"tier{n}": config_files.tier(n) for n in (1, 2)}
    )
    bench: bench.Plan = bench.PLAN
    tests: tuple[str, ...] = ()
    train: tuple[str, ...] = ("--tier", "1")
    first_steps: int = 20
    seconds: float = 30.0
    characters: int = 200
    limit: float = 3600.0


@dataclass(frozen=True)
class Lab:
    """A folder, `home`, with runs and data; `source` is a text to learn, None for Tier 1's own."""

    plan: Plan
    home: Path
    source: Path | None

    def run(self, name: str) -> Run:
        """One of the trainings here."""
        return runs.open_run(self.home / "runs" / name)

    def mlxgpt(self, *line: str) -> tuple[Any, int]:
        """What a command of mlxgpt tells as JSON, and the most memory that it took.

        Raises:
            RuntimeError: with its last line, if it tells none.
        """
        ended = ran(command(line, "--json"), self.plan.limit, self.home)
        try:
            told, peak = ended.out.splitlines()[-2:]
            return json.loads(told), int(peak)
        except ValueError:
            raise RuntimeError(ended.last) from None

    def training_line(self, name: str, steps: int, data: str | None) -> list[str]:
        """The command line of a training.

        Args:
            data: a data folder here to learn from; None: from the text, which makes one.
        """
        source = self.home / "data" / data if data else self.source
        quarter = str(max(1, steps // 4))
        line = ["train", *self.plan.train, "--run", name, "--max-steps", str(steps)]
        line += ["--source", str(source)] if source else []
        line += ["--warmup-steps", str(min(100, steps // 10)), "--save-interval", quarter]
        log = str(max(1, min(10, steps // 20)))
        return [*line, "--eval-interval", quarter, "--log-interval", log]

    def kill(self, name: str, line: Sequence[str], at: int) -> int:
        """Begin a training, and kill it when it has logged step `at` and has a checkpoint; the
        last step that it logged.

        Raises:
            RuntimeError: if it ends by itself before that.
        """
        deadline = time.monotonic() + self.plan.limit
        with running(command(line), self.home) as (process, ended):
            while process.poll() is None and not (self.logged(name) >= at and self.saved(name)):
                if time.monotonic() > deadline:
                    raise RuntimeError("it came to no checkpoint")
                time.sleep(0.01)
            process.kill()
            process.wait()
            if process.returncode != -signal.SIGKILL:
                raise RuntimeError(f"it ended before it was killed: {ended().last}")
        return self.logged(name)

    def logged(self, name: str) -> int:
        """The last step in a training's metrics; 0 where it has not begun."""
        with contextlib.suppress(UserError):
            return max((record["step"] for record in self.run(name).metrics()), default=0)
        return 0

    def saved(self, name: str) -> bool:
        """Whether a training has a checkpoint."""
        return bool(self.run(name).steps())


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def last(self) -> str:
        """What it said last, but for what to do about it."""
        said = [line for line in (self.out + self.err).splitlines() if line.strip()]
        said = [line for line in said if not line.startswith("  →")]
        return said[-1] if said else f"its process ended with code {self.code}"


def command(line: Sequence[str], *more: str) -> list[str]:
    """`mlxgpt` with a command line, as this Python runs it."""
    return [sys.executable, "-c", MLXGPT, *line, *more]


def ran(command: Sequence[str], limit: float, home: Path | None = None) -> Ended:
    """Run a command to its end.

    Raises:
        RuntimeError: if it takes longer than `limit` seconds.
    """
    with running(command, home) as (process, ended):
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"it took more than {limit / 60:.0f} minutes") from None
        return ended()


@contextlib.contextmanager
def running(
    command: Sequence[str], home: Path | None
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], Ended]]]:
    """A process in the checkout, and what tells how it ended. If it has not, it is killed, with all
    that it began.
    """
    environment = {**os.environ, **({"MLXGPT_HOME": str(home)} if home else {})}
    began = time.monotonic()
    # Files, as a pipe that nobody reads is full at some time.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )

        def ended() -> Ended:
            seconds = time.monotonic() - began
            for file in (out, err):
                file.seek(0)
            said = [file.read().decode(errors="replace") for file in (out, err)]
            return Ended(process.wait(), said[0], said[1], seconds)

        try:
            yield process, ended
        finally:
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.wait()


def steps_in(seconds: float, lines: Sequence[Mapping[str, Any]], tokens: int) -> int:
    """How many steps of so many tokens take that time, at the speed of the second half of the
    lines of metrics.
    """
    later = lines[len(lines) // 2 :]
    rate = statistics.median(line["tokens_per_second"] for line in later)
    return max(FEWEST_STEPS, round(seconds * rate / tokens))


def rates_of_fifths(lines: Sequence[Mapping[str, Any]], steps: int) -> tuple[float, float]:
    """Tokens a second in the first fifth of the steps, and in the last."""
    starts = [0, *(line["step"] for line in lines)]
    rates = []
    for low, high in ((0, steps / 5), (4 * steps / 5, steps)):
        taken = seconds = 0.0
        for start, line in zip(starts, lines, strict=False):
            if low < line["step"] <= high:
                taken += line["step"] - start
                seconds += (line["step"] - start) / line["tokens_per_second"]
        rates.append(taken / seconds)
    return rates[0], rates[1]


def loss_of(line: Mapping[str, Any]) -> float:
    """A line's loss, which in JSON is null where it is no number."""
    return math.nan if line["loss"] is None else line["loss"]


@dataclass(frozen=True)
class Apart:
    """How far two trainings are apart in the end.

    Attributes:
        bits: whether all weights and moments are the same, bit by bit.
        largest: difference between two of them; losses: between two that were logged.
    """

    bits: bool
    largest: float
    losses: float

    @property
    def same(self) -> bool:
        """Whether nothing is apart."""
        return self.bits and self.losses == 0

    def __str__(self) -> str:
        if self.same:
            return "the same bits, and the same losses"
        return f"weights apart by at most {self.largest:.2g}, losses by {self.losses:.2g}"


def apart(one: Run, other: Run) -> Apart:
    """How far two trainings are apart in their last checkpoints, and in what they logged."""
    here, there = final_state(one), final_state(other)
    if here.keys() != there.keys():
        raise RuntimeError("the two checkpoints do not have the same arrays")
    pairs = [(here[name], there[name]) for name in here]
    with np.errstate(all="ignore"):  # of numbers that are none
        largest = max(float(np.abs(a.astype(float) - b.astype(float)).max()) for a, b in pairs)
    losses = [{r["step"]: loss_of(r) for r in run.metrics()} for run in (one, other)]
    if losses[0].keys() != losses[1].keys():
        raise RuntimeError("the two trainings did not log the same steps")
    return Apart(
        bits=all(a.tobytes() == b.tobytes() for a, b in pairs),
        largest=largest,
        losses=max(abs(loss - losses[1][step]) for step, loss in losses[0].items()),
    )


def final_state(run: Run) -> dict[str, np.ndarray]:
    """Weights and moments of a run's last checkpoint."""
    saved = checkpoint.load(run.checkpoint_path("newest"), with_optimizer=True)
    arrays = saved.parameters | (saved.optimizer or {})
    return {name: np.array(value) for name, value in arrays.items()}
