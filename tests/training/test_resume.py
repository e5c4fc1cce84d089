"""Interrupting and resuming training runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxgpt import api
from mlxgpt.backend import device
from mlxgpt.config import Config
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.training import estimate, loop, resume, run_writer, selfcheck
from mlxgpt.training.selfcheck import CheckResult
from mlxgpt.utils.errors import UserError
from tests.helpers.commands import ROOT
from tests.helpers.training_runs import (
    MODERN_PARTS,
    MODERN_STEPS,
    Recorder,
    capture_log_lines,
    final_state,
    last_saved_step,
    metrics,
)

pytestmark = pytest.mark.usefixtures("no_check")  # the self-check is tested separately


class SimulatedCrash(Exception):
    """Simulates a crash of the process."""


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("parts", [{}, {**MODERN_PARTS, **MODERN_STEPS}], ids=["classic", "modern"])
@pytest.mark.exact_bits
def test_resume_after_three_interruptions_is_bit_exact(
    train: Any, monkeypatch: pytest.MonkeyPatch, accumulation: int, parts: dict[str, Any]
) -> None:
    """With dropout; the interrupted run evaluates, logs and saves at different steps."""
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 30, **parts}
    settings["eval_tokens"] = 16
    train("whole", **settings)
    for stop_step in (3, 11, 20):
        stops = iter([False] * (stop_step - last_saved_step("parts") - 1) + [True])
        with monkeypatch.context() as patch:
            patch.setattr(loop, "catch_stop_signals", lambda stops=stops: ScriptedStops(stops))
            summary = train("parts", eval_interval=5, log_interval=1, save_interval=7, **settings)
        assert summary.interrupted
        assert summary.step == stop_step
    summary = train("parts", eval_interval=10, sample_tokens=0, **settings)
    assert summary.resumed
    assert not summary.interrupted
    last_losses = [metrics(name)[-1]["val_loss"] for name in ("whole", "parts")]
    assert last_losses[0] == last_losses[1], "judged by the same windows"
    expected, parts = final_state("whole"), final_state("parts")
    assert expected.keys() == parts.keys()
    for name, value in expected.items():
        assert (value == parts[name]).all(), name


class ScriptedStops:
    """Replacement for the stop signals that reads from an iterator."""

    def __init__(self, script: Any) -> None:
        self.script = script

    def __enter__(self) -> Any:
        return lambda: next(self.script)

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("name", ["save", "add_evaluation", "log"])
@pytest.mark.exact_bits
def test_resume_after_a_crash_while_writing_is_bit_exact(
    train: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    train("whole")
    original = getattr(run_writer.RunWriter, name)

    def crash_at_step_8(self: object, subject: Any, *args: object) -> None:
        step = subject["step"] if name == "log" else getattr(subject, "step", subject)
        if step == 8:
            raise SimulatedCrash
        original(self, subject, *args)

    with monkeypatch.context() as patch:
        patch.setattr(run_writer.RunWriter, name, crash_at_step_8)
        with pytest.raises(SimulatedCrash):
            train("died")
    recorder = Recorder()
    assert train("died", recorder).resumed
    resume_step = 4 if name == "save" else 8
    assert recorder.log_lines == [f"resuming died from step {resume_step}"]
    assert metrics("died") == metrics("whole"), "each step once, the evaluation included"
    assert runs.open_run(Path("runs/died")).best() == runs.open_run(Path("runs/whole")).best()
    expected_state, actual = final_state("whole"), final_state("died")
    assert all((value == actual[name]).all() for name, value in expected_state.items())


def train_and_stop(
    monkeypatch: pytest.MonkeyPatch, train: Any, steps: int, from_step: int = 0, **settings: Any
) -> None:
    """Train run `a` for some steps, then stop it."""
    with monkeypatch.context() as patch:
        script = iter([False] * (steps - 1) + [True])
        patch.setattr(loop, "catch_stop_signals", lambda: ScriptedStops(script))
        assert train("a", **settings).step == from_step + steps


def read_history(run: str) -> list[dict[str, Any]]:
    lines = (Path("runs") / run / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
    ],
)
def test_resume_with_settings_that_need_less_memory(
    train: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Each step has the same sequences, so the result is the same except for rounding."""
    train("whole", dropout=0.0, batch_size=4)
    train_and_stop(monkeypatch, train, 5, dropout=0.0, batch_size=4)
    recorder = Recorder()
    train("a", recorder, **{"dropout": 0.0, "batch_size": 4, **change})
    old = {"batch_size": 4, "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
    changes = ", ".join(f"{name} {old[name]} → {value}" for name, value in change.items())
    assert recorder.log_lines[-1] == (
        f"changed since a was last trained: {changes}; results may differ from an uninterrupted "
        "run by rounding"
    )
    assert [entry["step"] for entry in read_history("a")] == [0, 5]
    assert read_history("a")[0]["changed"] == {}
    assert read_history("a")[1]["changed"] == {
        field: [old[field], value] for field, value in change.items()
    }
    expected, actual = final_state("whole"), final_state("a")
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    with pytest.raises(UserError, match="batch_size"):
        train("a", **{"dropout": 0.0, **change, "batch_size": 2})


def test_changed_settings_without_numerical_effect_are_only_logged(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_and_stop(monkeypatch, train, 5)
    recorder = Recorder()
    train("a", recorder, on_spike="skip")
    assert recorder.log_lines[-1] == "changed since a was last trained: on_spike ignore → skip"
    assert read_history("a")[1]["changed"] == {"on_spike": ["ignore", "skip"]}


def test_a_changed_environment_is_logged(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"mlx": "0.32.4", "BLAS threads": "2"}
    monkeypatch.setattr(resume, "describe_environment", lambda ranks: environment)
    train_and_stop(monkeypatch, train, 5)
    monkeypatch.setattr(
        resume, "describe_environment", lambda ranks: {**environment, "BLAS threads": "8"}
    )
    recorder = Recorder()
    train("a", recorder)
    assert recorder.log_lines[-1] == (
        "changed since a was last trained: BLAS threads 2 → 8; results may differ from an "
        "uninterrupted run by rounding"
    )
    assert [entry["on"]["BLAS threads"] for entry in read_history("a")] == ["2", "8"]


def test_an_unchanged_environment_is_not_logged(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_and_stop(monkeypatch, train, 5)
    recorder = Recorder()
    train("a", recorder)
    assert recorder.log_lines == ["resuming a from step 5"]
    assert read_history("a")[0]["on"] == read_history("a")[1]["on"]


@pytest.mark.parametrize(
    ("change", "is_checked"),
    [
        (None, False),
        ({"mlx": "0.0.1"}, True),
        ({"mlxgpt": "0.0.1"}, True),
        ({"device": "Apple M1"}, True),
        ({"backend": "metal"}, True),
        ("unknown", True),
    ],
    ids=str,
)
def test_self_check_runs_again_in_a_changed_environment(
    train: Any, monkeypatch: pytest.MonkeyPatch, change: Any, is_checked: bool
) -> None:
    """It runs before each new run, and when resuming in a different or unknown environment."""
    checked: list[Config] = []

    def check(config: Config) -> Iterator[CheckResult]:
        checked.append(config)
        yield CheckResult("causality", True, "fine")

    monkeypatch.setattr(selfcheck, "run_self_check", check)
    train_and_stop(monkeypatch, train, 5)
    assert len(checked) == 1
    path = Path("runs/a/history.jsonl")
    if change == "unknown":
        path.unlink()
    elif change:
        (entry,) = read_history("a")
        path.write_text(json.dumps({**entry, "on": {**entry["on"], **change}}) + "\n")
    train_and_stop(monkeypatch, train, 3, on_spike="skip", from_step=5)
    assert len(checked) == 1 + is_checked
    assert train("a").step == 12
    assert len(checked) == 1 + is_checked, "the new environment was recorded"


def test_a_failed_self_check_stops_a_resumed_run(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_and_stop(monkeypatch, train, 5)
    before = {p: p.read_bytes() for p in Path("runs/a").rglob("*") if p.is_file()}
    monkeypatch.setattr(
        selfcheck,
        "run_self_check",
        lambda config: iter([CheckResult("causality", False, "sees ahead")]),
    )
    monkeypatch.setattr(resume, "describe_environment", lambda ranks: {"mlx": "9.9"})
    with pytest.raises(UserError, match="the self-check failed: causality: sees ahead"):
        train("a")
    assert {p: p.read_bytes() for p in Path("runs/a").rglob("*") if p.is_file()} == before


def test_a_damaged_history_is_ignored(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train_and_stop(monkeypatch, train, 5)
    Path("runs/a/history.jsonl").write_text('{"step": 0, "on": 3}\n{"ste')
    recorder = Recorder()
    train("a", recorder)
    assert recorder.log_lines == ["resuming a from step 5"]


def test_resuming_does_not_measure_step_times(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step time is known from the run; only memory is measured, with one short step."""
    train_and_stop(monkeypatch, train, 5, gradient_accumulation_steps=3)
    micro_batches: list[int] = []
    original = estimate.take_steps

    def count_steps(step_function: Any, tokens: Any, config: Config, steps: int) -> None:
        micro_batches.append(steps * config.train.gradient_accumulation_steps)
        original(step_function, tokens, config, steps)

    monkeypatch.setattr(estimate, "take_steps", count_steps)
    recorder = Recorder()
    train("a", recorder, gradient_accumulation_steps=3)
    assert micro_batches == [2], "two micro-batches, as each holds on to the sum of those before"
    assert recorder.estimate is not None
    assert recorder.estimate.seconds > 0


def test_a_finished_run_is_left_unchanged(train: Any) -> None:
    train("a")
    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*")}
    recorder = Recorder()
    summary = train("a", recorder)
    assert recorder.log_lines == ["a is finished: 12 steps"]
    assert (summary.step, summary.interrupted) == (12, False)
    assert {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*")} == before


@pytest.mark.exact_bits
def test_a_run_can_be_extended_if_the_schedule_has_decay_steps(train: Any) -> None:
    train("a", decay_steps=12)
    recorder = Recorder()
    assert train("a", recorder, decay_steps=12, max_steps=20).step == 20
    assert recorder.max_steps == 20
    assert [record["step"] for record in metrics("a")] == list(range(2, 21, 2))
    train("b", decay_steps=12, max_steps=20)
    a, b = final_state("a"), final_state("b")
    assert all((value == b[name]).all() for name, value in a.items())


def test_a_damaged_newest_checkpoint_is_reported_and_skipped(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("whole", decay_steps=12)
    monkeypatch.setattr(checkpoint, "prune_checkpoints", lambda folder, keep: None)
    train("a", decay_steps=12)
    weights = Path("runs/a/checkpoints/step-0000012/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    recorder = Recorder()
    train("a", recorder, decay_steps=12, max_steps=13)
    assert "step-0000012 is missing or damaged" in recorder.log_lines[0]
    assert recorder.log_lines[1] == "resuming a from step 8"
    assert [record["step"] for record in metrics("a")] == [2, 4, 6, 8, 10, 12, 13]


def test_estimate_of_a_resumed_run_covers_the_remaining_steps(train: Any) -> None:
    train("a", max_steps=8, decay_steps=12)
    recorder = Recorder()
    train("a", recorder, max_steps=12, decay_steps=12)
    assert recorder.estimate is not None
    assert (recorder.estimate.steps, recorder.estimate.evaluations) == (4, 1)


@pytest.mark.exact_bits
def test_exceeding_the_memory_limit_saves_and_stops(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_calls: list[int] = []

    def memory() -> tuple[int, str]:
        memory_calls.append(1)
        return (int(3e12) if len(memory_calls) > 5 else 0), "resident"

    with monkeypatch.context() as patch:
        patch.setattr(device, "memory_in_use", memory)
        with pytest.raises(
            UserError, match="exceeded the memory limit of 1000 GB: saved"
        ) as excinfo:
            train("a", memory_limit=1000.0, log_interval=100)
    assert "larger --memory-limit" in excinfo.value.remedy
    saved_step = runs.open_run(Path("runs/a")).steps()[-1]
    assert 0 < saved_step < 12, "stopped on the way, and saved"
    assert train("a", memory_limit=1000.0, log_interval=100).step == 12
    train("b")
    for name, value in final_state("b").items():
        assert (final_state("a")[name] == value).all(), name


def test_a_checkpoint_of_another_run_is_refused(train: Any) -> None:
    train("a")
    Path("other.txt").write_text("quite another text, with other characters: 12345. " * 9)
    train("b", source="other.txt")
    checkpoint_a, checkpoint_b = (Path(f"runs/{name}/checkpoints/step-0000012") for name in "ab")
    checkpoint_a.rename("aside")
    checkpoint_b.rename(checkpoint_a)
    with pytest.raises(UserError, match="different tokenizer"):
        api.generate(run="a", checkpoint="12")


TRAIN_SCRIPT = """
import sys
from mlxgpt import api
from mlxgpt.training import selfcheck
from mlxgpt.config import config_from_tree
from tests.conftest import TINY
selfcheck.run_self_check = lambda config: iter([])
tree = {**TINY, "train": {**TINY["train"], "max_steps": 100_000, "log_interval": 50}}
summary = api.train(config=config_from_tree(tree), source="words.txt", run="a")
print(summary.interrupted, summary.step)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stop_signal_finishes_the_step_and_saves(home: Path, text_file: Path, name: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN_SCRIPT],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    log, deadline = Path("runs/a/metrics.jsonl"), time.monotonic() + 300
    while not (log.exists() and log.read_text()) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    interrupted, step = output.split()
    assert interrupted == "True"
    assert int(step) == last_saved_step("a") > 0


def test_a_stop_signal_during_logging_is_handled(train: Any) -> None:
    """The signal handler must not write, since writing to a stream is not reentrant."""

    class Writing(Recorder):
        def on_log(self, record: dict[str, Any]) -> None:
            signal.raise_signal(signal.SIGINT)

    threads: list[str] = []

    def log(line: str) -> None:
        if line.startswith("saving and stopping"):
            threads.append(threading.current_thread().name)

    with capture_log_lines(log):
        assert train("a", Writing()).interrupted
        while not threads:
            time.sleep(0.01)
    assert threads[0] != threading.main_thread().name


def test_a_resumed_run_removes_leftovers_of_a_killed_process(train: Any) -> None:
    train("a")
    leftovers = [Path("runs/a/checkpoints", name) for name in (".writing-x", ".step-0000004.gone")]
    for folder in leftovers:
        folder.mkdir()
    before = checkpoint.list_steps(Path("runs/a/checkpoints"))
    train("a")
    assert not [folder for folder in leftovers if folder.exists()]
    assert checkpoint.list_steps(Path("runs/a/checkpoints")) == before
