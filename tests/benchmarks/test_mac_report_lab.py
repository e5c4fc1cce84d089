from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mac_report_lab as lab_of
import pytest
from mac_report_lab import Lab, Plan

from mlxgpt.storage import notes
from mlxgpt.storage import run as runs
from tests.benchmarks.made_up import new_lab


def test_a_command_that_fails_gives_its_last_line(tmp_path: Path) -> None:
    lab = new_lab(tmp_path / "home")
    with pytest.raises(RuntimeError, match=r"^mlxgpt: there is no run 'none' in .*home/runs"):
        lab.mlxgpt("generate", "--run", "none")
    tree, peak = lab.mlxgpt("runs")
    assert tree == []
    assert 10e6 < peak < 10e9


def test_a_command_that_takes_too_long_is_killed_with_what_it_began(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(RuntimeError, match="it took more than 0 minutes"):
        lab_of.ran([sys.executable, "-c", code], 3.0)
    child = int((tmp_path / "pid").read_text())
    for _ in range(200):
        status = Path(f"/proc/{child}/stat")
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            return  # dead, and nobody has asked for how it ended
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child lives on")


def test_what_a_command_said_last() -> None:
    ended = lab_of.Ended(2, "out\n", "mlxgpt: it is so\n  → do this\n\n", 1.0)
    assert ended.last == "mlxgpt: it is so"
    assert lab_of.Ended(-6, "", "\n", 1.0).last == "its process ended with code -6"


def line_at(step: int, rate: float) -> dict[str, float]:
    return {"step": step, "tokens_per_second": rate}


def test_how_many_steps_fit() -> None:
    # A warm half at 2,000 tokens a second, after a cold one.
    lines = [line_at(n, 10.0 if n < 4 else 2000.0) for n in range(1, 7)]
    assert lab_of.steps_in(30.0, lines, 1000) == 60
    assert lab_of.steps_in(0.1, lines, 1000) == lab_of.FEWEST_STEPS


def test_rates_of_the_first_and_the_last_fifth() -> None:
    # Unequal distances: 10 steps at 100, 10 at 300, then slow, and in the end 5 at 50, 15 at 150.
    lines = [line_at(10, 100.0), line_at(20, 300.0), line_at(50, 7.0), line_at(80, 7.0)]
    lines += [line_at(85, 50.0), line_at(100, 150.0)]
    first, last = lab_of.rates_of_fifths(lines, 100)
    assert first == pytest.approx(20 / (10 / 100 + 10 / 300))
    assert last == pytest.approx(20 / (5 / 50 + 15 / 150))


def test_a_trainings_command_line(tmp_path: Path) -> None:
    lab = Lab(Plan(), tmp_path, tmp_path / "text.txt")
    line = " ".join(lab.training_line("first", 1000, None))
    assert line.startswith(f"train --tier 1 --run first --max-steps 1000 --source {lab.source} ")
    assert line.endswith("--warmup-steps 100 --save-interval 250 --eval-interval 250 "
                         "--log-interval 10")  # fmt: skip
    assert f"--source {tmp_path}/data/text-char " in " ".join(
        lab.training_line("a", 9, "text-char")
    )
    bare = replace(lab, source=None).training_line("first", 20, None)
    assert "--source" not in bare, "Tier 1 gets its own text"
    assert bare[-1] == "1"
    assert bare[bare.index("--warmup-steps") + 1] == "2", "a tenth of a short training"


@pytest.mark.usefixtures("no_check")
def test_how_far_two_trainings_are_apart(home: Path, train: Any) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        train(name, seed=seed)
    a, b, c = (runs.open_run(home / "runs" / name) for name in "abc")
    same = lab_of.apart(a, b)
    assert same.same
    assert str(same) == "the same bits, and the same losses"
    other = lab_of.apart(a, c)
    assert not other.same
    assert not other.bits
    assert other.largest > 1e-3
    assert other.losses > 1e-3
    assert str(other).startswith("weights apart by at most ")
    metrics = c.folder / notes.METRICS
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(RuntimeError, match="did not log the same steps"):
        lab_of.apart(a, c)


@pytest.mark.usefixtures("no_check")
def test_losses_alone_tell_two_trainings_apart(home: Path, train: Any) -> None:
    train("a")
    shutil.copytree("runs/a", "runs/b")
    metrics = Path("runs/b") / notes.METRICS
    metrics.write_text(re.sub(r'"loss": [\d.]+', '"loss": 9.0', metrics.read_text(), count=1))
    found = lab_of.apart(*(runs.open_run(home / "runs" / name) for name in "ab"))
    assert found.bits
    assert not found.same
