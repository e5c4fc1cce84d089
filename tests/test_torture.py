"""Runs that are killed at random moments, mostly during writes, or lose power end with the same
bits as an undisturbed run.
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
from tests.helpers.crash import simulate_power_cut
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


def run_training(plan: dict[str, Any]) -> bool:
    """Run training until it ends or is killed; return whether it ended."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.helpers.crash", json.dumps(plan)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return result.returncode == 0


def train_with_kills(kills: int, seed: int, base_config: dict[str, Any], *, power: bool) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    assert run_training({"config": base_config})
    expected, expected_metrics = final_state("a"), {line["step"]: line for line in metrics("a")}
    assert sorted(expected_metrics) == list(range(1, STEPS + 1))
    shutil.rmtree("runs")
    killed = killed_at_write = finished = 0
    while killed < kills:
        intervals = {name: rng.randint(3, 9) for name in ("eval_interval", "save_interval")}
        config = {**base_config, "train": {**base_config["train"], **intervals}}
        plan: dict[str, Any] = {"config": config}
        if rng.random() < 0.8:
            plan |= {"event": rng.randint(1, 120), "late": rng.choice([0, 1e-4, 1e-3, 5e-3])}
        else:
            plan["after"] = rng.uniform(0.01, 0.5)
        if power:
            shutil.rmtree("journal", ignore_errors=True)
            Path("journal").mkdir()
            plan["journal"] = "journal"
        completed = run_training(plan)
        if not completed:
            killed += 1
            killed_at_write += "event" in plan
            if power:
                simulate_power_cut(Path("runs"), Path("journal"), rng)
            continue
        assert_same_result(expected, expected_metrics)
        finished += 1
        shutil.rmtree("runs")
    assert run_training({"config": base_config})
    assert_same_result(expected, expected_metrics)
    print(
        f"killed {killed} times, {killed_at_write} of them at a writing, {finished + 1} runs ended"
    )


def assert_same_result(expected: dict[str, Any], expected_metrics: dict[int, Any]) -> None:
    actual = final_state("a")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (value == actual[name]).all(), name
    logged = metrics("a")
    assert [line["step"] for line in logged] == sorted(expected_metrics), "each step once"
    for line in logged:
        assert line["loss"] == expected_metrics[line["step"]]["loss"]
    text = Path("runs/a/samples.txt").read_text(encoding="utf-8")
    headers = [line for line in text.splitlines() if line.startswith("--- step ")]
    assert len(headers) == len(set(headers)), "each sample once"
    for step in checkpoint.list_steps(Path("runs/a/checkpoints")):
        checkpoint.load_checkpoint(
            checkpoint.checkpoint_folder(Path("runs/a/checkpoints"), step), with_optimizer=True
        )


@pytest.mark.parametrize("recipe", [CONFIG, MODERN], ids=["classic", "modern"])
@pytest.mark.exact_bits
def test_training_after_kills_is_bit_exact(
    home: Path, text_file: Path, recipe: dict[str, Any]
) -> None:
    train_with_kills(5, random.randrange(1 << 30), recipe, power=False)


@pytest.mark.parametrize("recipe", [CONFIG, MODERN], ids=["classic", "modern"])
@pytest.mark.exact_bits
def test_training_after_power_cuts_is_bit_exact(
    home: Path, text_file: Path, recipe: dict[str, Any]
) -> None:
    train_with_kills(2, random.randrange(1 << 30), recipe, power=True)


def compare_with_kills(kills: int, seed: int) -> None:
    """Kill a comparison `kills` times and check that its results do not change."""
    print("seed", seed)
    rng = random.Random(seed)
    comparison = {
        "vary": "learning_rate=1e-2,1e-3",
        "budget": "12steps",
        "seeds": 2,
        "name": "mine",
    }
    plan = {"config": TINY, "compare": comparison}

    def results() -> list[tuple[float, list[float]]]:
        tree = json.loads(Path("runs/compare/mine/mine.json").read_text())
        trainings = [t for variant in tree["variants"] for t in variant["trainings"]]
        return [(t["bits_per_byte"], t["curve"]["bits_per_byte"]) for t in trainings]

    assert run_training(plan)
    expected = results()
    assert len(expected) == 4
    shutil.rmtree("runs")
    killed = finished = 0
    while killed < kills:
        if run_training(
            {**plan, "event": rng.randint(1, 200), "late": rng.choice([0, 1e-4, 1e-3])}
        ):
            assert results() == expected
            finished += 1
            shutil.rmtree("runs")
        else:
            killed += 1
    assert run_training(plan)
    assert results() == expected
    print(f"killed {killed} times, {finished + 1} comparisons ended")


@pytest.mark.exact_bits
def test_comparison_after_kills_is_bit_exact(home: Path, text_file: Path) -> None:
    compare_with_kills(5, random.randrange(1 << 30))


@pytest.mark.slow
@pytest.mark.exact_bits
def test_comparison_after_forty_kills_is_bit_exact(home: Path, text_file: Path) -> None:
    compare_with_kills(40, random.randrange(1 << 30))


@pytest.mark.slow
@pytest.mark.parametrize("power", [False, True])
@pytest.mark.exact_bits
def test_fifty_kills_and_fifty_power_cuts(home: Path, text_file: Path, power: bool) -> None:
    # Kills use the classic recipe, power cuts the modern one.
    train_with_kills(50, random.randrange(1 << 30), MODERN if power else CONFIG, power=power)
