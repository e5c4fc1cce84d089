"""A training killed again and again, at random moments, mostly while it writes; and its power cut.
In the end it has the same bits as one that nobody touched.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxgpt.storage import checkpoint
from tests.conftest import TINY
from tests.helpers.commands import ROOT
from tests.helpers.crash import cut_the_power
from tests.helpers.training_runs import MODERN_PARTS, MODERN_STEPS, final_state, metrics

STEPS = 40
CONFIG = {
    **TINY,
    "train": {
        **TINY["train"],
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "log_interval": 1,
        "on_spike": "skip",
    },
}


MODERN = {
    **CONFIG,
    "model": {**CONFIG["model"], **MODERN_PARTS, "bias": False},
    "optim": {**CONFIG["optim"], **MODERN_STEPS},
}


def live(plan: dict[str, Any]) -> bool:
    """One life of a training; whether it came to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.crash", json.dumps(plan)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode == 0


def torture(kills: int, seed: int, whole_config: dict[str, Any], *, power: bool) -> None:
    print("seed", seed)
    draw = random.Random(seed)
    assert live({"config": whole_config})
    whole, lines = final_state("a"), {line["step"]: line for line in metrics("a")}
    assert sorted(lines) == list(range(1, STEPS + 1))
    shutil.rmtree("runs")
    survived = moments = finished = 0
    while survived < kills:
        intervals = {name: draw.randint(3, 9) for name in ("eval_interval", "save_interval")}
        config = {**whole_config, "train": {**whole_config["train"], **intervals}}
        plan: dict[str, Any] = {"config": config}
        if draw.random() < 0.8:
            plan |= {"event": draw.randint(1, 120), "late": draw.choice([0, 1e-4, 1e-3, 5e-3])}
        else:
            plan["after"] = draw.uniform(0.01, 0.5)
        if power:
            shutil.rmtree("journal", ignore_errors=True)
            Path("journal").mkdir()
            plan["journal"] = "journal"
        ended = live(plan)
        if not ended:
            survived += 1
            moments += "event" in plan
            if power:
                cut_the_power(Path("runs"), Path("journal"), draw)
            continue
        assert_the_same(whole, lines)
        finished += 1
        shutil.rmtree("runs")
    assert live({"config": whole_config})
    assert_the_same(whole, lines)
    print(f"killed {survived} times, {moments} of them at a writing, {finished + 1} runs ended")


def assert_the_same(whole: dict[str, Any], lines: dict[int, Any]) -> None:
    after = final_state("a")
    assert after.keys() == whole.keys()
    for name, value in whole.items():
        assert (value == after[name]).all(), name
    noted = metrics("a")
    assert [line["step"] for line in noted] == sorted(lines), "each step once"
    for line in noted:
        assert line["loss"] == lines[line["step"]]["loss"]
    text = Path("runs/a/samples.txt").read_text(encoding="utf-8")
    heads = [line for line in text.splitlines() if line.startswith("--- step ")]
    assert len(heads) == len(set(heads)), "each sample once"
    for step in checkpoint.list_steps(Path("runs/a/checkpoints")):
        checkpoint.load_checkpoint(
            checkpoint.checkpoint_folder(Path("runs/a/checkpoints"), step), with_optimizer=True
        )


@pytest.mark.parametrize("recipe", [CONFIG, MODERN], ids=["classic", "modern"])
@pytest.mark.exact_bits
def test_kills(home: Path, text_file: Path, recipe: dict[str, Any]) -> None:
    torture(5, random.randrange(1 << 30), recipe, power=False)


@pytest.mark.parametrize("recipe", [CONFIG, MODERN], ids=["classic", "modern"])
@pytest.mark.exact_bits
def test_power_cuts(home: Path, text_file: Path, recipe: dict[str, Any]) -> None:
    torture(2, random.randrange(1 << 30), recipe, power=True)


def torture_comparison(kills: int, seed: int) -> None:
    """Killed again and again, it ends as one that nobody touched."""
    print("seed", seed)
    draw = random.Random(seed)
    asked = {"vary": "learning_rate=1e-2,1e-3", "budget": "12steps", "seeds": 2, "name": "mine"}
    plan = {"config": TINY, "compare": asked}

    def results() -> list[tuple[float, list[float]]]:
        tree = json.loads(Path("runs/compare/mine/mine.json").read_text())
        trainings = [t for variant in tree["variants"] for t in variant["trainings"]]
        return [(t["bits_per_byte"], t["curve"]["bits_per_byte"]) for t in trainings]

    assert live(plan)
    whole = results()
    assert len(whole) == 4
    shutil.rmtree("runs")
    survived = finished = 0
    while survived < kills:
        if live({**plan, "event": draw.randint(1, 200), "late": draw.choice([0, 1e-4, 1e-3])}):
            assert results() == whole
            finished += 1
            shutil.rmtree("runs")
        else:
            survived += 1
    assert live(plan)
    assert results() == whole
    print(f"killed {survived} times, {finished + 1} comparisons ended")


@pytest.mark.exact_bits
def test_a_comparison_that_is_killed(home: Path, text_file: Path) -> None:
    torture_comparison(5, random.randrange(1 << 30))


@pytest.mark.slow
@pytest.mark.exact_bits
def test_a_comparison_that_is_killed_forty_times(home: Path, text_file: Path) -> None:
    torture_comparison(40, random.randrange(1 << 30))


@pytest.mark.slow
@pytest.mark.parametrize("power", [False, True])
@pytest.mark.exact_bits
def test_a_hundred_kills(home: Path, text_file: Path, power: bool) -> None:
    # Each recipe once, with either way to die.
    torture(50, random.randrange(1 << 30), MODERN if power else CONFIG, power=power)
