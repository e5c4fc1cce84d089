from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.config import Config
from mlxgpt.data.token_array import Batch, TokenArray
from mlxgpt.storage import run as runs
from mlxgpt.training import loop, spike_guard
from mlxgpt.training.spike_guard import LOSS_WINDOW, MAX_CONSECUTIVE_SKIPS, MIN_LOSSES, SpikeGuard
from mlxgpt.utils.errors import UserError
from tests.helpers.training_runs import Recorder, final_state, metrics


def feed_losses(losses: list[float], on_spike: str = "skip") -> SpikeGuard:
    guard = SpikeGuard(on_spike)
    for step, loss in enumerate(losses):
        guard.record(step, loss, 1.0, math.inf)
    return guard


def test_the_limit_is_six_deviations_above_the_mean_of_the_last_100_losses() -> None:
    losses = [100.0] * 30 + [2.0 + 0.1 * (-1) ** n for n in range(LOSS_WINDOW)]
    guard = feed_losses([*losses, 7.0])
    assert guard.loss_limit(len(losses) + 1) == pytest.approx(2.0 + 6 * 0.1)
    assert feed_losses(losses[: MIN_LOSSES - 1]).loss_limit(MIN_LOSSES) == math.inf
    assert feed_losses(losses, "ignore").loss_limit(len(losses) + 1) == math.inf


@given(
    losses=st.lists(st.floats(0, 10, width=32), min_size=MIN_LOSSES + 2, max_size=LOSS_WINDOW + 40)
)
def test_the_limit_ignores_the_last_step(losses: list[float]) -> None:
    """So it does not depend on whether the last loss is already available."""
    late, early = feed_losses(losses[:-1]), feed_losses(losses)
    assert late.loss_limit(len(losses)) == early.loss_limit(len(losses))


def test_skipped_steps_are_counted_until_divergence() -> None:
    guard = feed_losses([1.0, math.nan, 1.0])
    assert (guard.skipped, guard.consecutive_skips) == (1, 0)
    for n in range(MAX_CONSECUTIVE_SKIPS):
        assert not guard.has_diverged
        guard.record(n, 1.0, math.inf, math.inf)
    assert guard.has_diverged
    assert (guard.skipped, len(guard.losses)) == (1 + MAX_CONSECUTIVE_SKIPS, 2)


def test_rollback_restores_the_saved_losses() -> None:
    """So the losses of repeated steps are not counted twice."""
    guard = feed_losses([2.0] * 30, "rollback")
    saved_tree = guard.to_tree()
    for step in range(30, 35):
        guard.record(step, 1.0, 1.0, 3.0)
    guard.record(35, 9.0, 1.0, 3.0)
    assert guard.spike_step == 35
    guard.roll_back(30, saved_tree)
    assert guard.losses == [(step, 2.0) for step in range(30)]
    assert (guard.batch_offset, guard.rollbacks) == (6, 1)
    assert (guard.skipped, guard.consecutive_skips) == (1, 0)
    assert not guard.must_stop


@given(losses=st.lists(st.floats(0, 10, width=32), max_size=LOSS_WINDOW + 40))
def test_guard_state_round_trips_through_a_checkpoint(losses: list[float]) -> None:
    guard = feed_losses(losses)
    assert SpikeGuard.from_tree(guard.to_tree(), "skip") == guard
    assert SpikeGuard.from_tree({}, "skip") == SpikeGuard("skip"), "as format 1 has it"


@pytest.mark.parametrize(
    "change",
    [
        {"losses": None},
        {"losses": [[1]]},
        {"losses": [["x", 1.0]]},
        {"losses": [[math.inf, 1.0]]},
        {"passed": -1},
        {"passed": "1"},
        {"passed": 1 << 60},
        {"skipped": True},
    ],
)
def test_damaged_guard_state_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="guard state is damaged"):
        SpikeGuard.from_tree({**SpikeGuard().to_tree(), **change})
    tree = SpikeGuard().to_tree()
    del tree[next(iter(change))]
    with pytest.raises(UserError, match="guard state is damaged"):
        SpikeGuard.from_tree(tree)


# Runs with a loss spike: after the model has learned the text, the targets of one batch are noise.
SPIKE_STEP = 45
LONG_SETTINGS: dict[str, Any] = {
    "max_steps": 60,
    "dropout": 0.0,
    "eval_interval": 100,
    "save_interval": 20,
    "log_interval": 1,
    "sample_tokens": 0,
}


@pytest.fixture
def noisy_batch(monkeypatch: pytest.MonkeyPatch, text_file: Path) -> None:
    """Replace the targets of one batch by noise, and shorten the guard's window for short runs."""
    monkeypatch.setattr(spike_guard, "LOSS_WINDOW", 15)
    monkeypatch.setattr(spike_guard, "MIN_LOSSES", 10)
    text_file.write_text("abcdefghijk" * 180)
    original = TokenArray.get_batch

    def batch(self: TokenArray, step: int, **kwargs: Any) -> Any:
        inputs, targets, *_ = original(self, step, **kwargs)
        return Batch(inputs, (np.roll(targets, 3) + 3) % 11 if step == SPIKE_STEP else targets)

    monkeypatch.setattr(TokenArray, "get_batch", batch)


@pytest.fixture
def spiking(train: Any, tiny: Config, no_check: None, noisy_batch: None) -> Any:
    config = replace(tiny, train=replace(tiny.train, batch_size=16))

    def spiking(run: str, recorder: Recorder | None = None, **options: Any) -> Any:
        return train(run, recorder, **{"config": config, **LONG_SETTINGS, **options})

    return spiking


def test_a_spike_is_ignored_by_default(spiking: Any) -> None:
    spiking("a")
    losses = [line["loss"] for line in metrics("a")]
    assert losses[SPIKE_STEP] > 4 * max(losses[SPIKE_STEP - 10 : SPIKE_STEP])
    assert (
        runs.open_run(Path("runs/a"))
        .load_first_valid(sorted(Path("runs/a/checkpoints").iterdir())[-1:])
        .guard["skipped"]
        == 0
    )


@pytest.mark.exact_bits
def test_a_spike_can_be_skipped(spiking: Any) -> None:
    spiking("a", on_spike="skip")
    spiking("b", on_spike="ignore")
    a, b = metrics("a"), metrics("b")
    assert a[: SPIKE_STEP + 1] == b[: SPIKE_STEP + 1], "it is the same until then"
    assert a[SPIKE_STEP + 1]["loss"] != b[SPIKE_STEP + 1]["loss"]
    assert [line["step"] for line in a] == list(range(1, 61))
    records = list(runs.open_run(Path("runs/a")).metrics())
    assert [line["skipped"] for line in records] == [0] * SPIKE_STEP + [1] * (60 - SPIKE_STEP)


@pytest.mark.parametrize(
    "stops", [(), (20, 43), (SPIKE_STEP, 50), (SPIKE_STEP + 1,), (SPIKE_STEP + 2, 59)]
)
@pytest.mark.exact_bits
def test_a_spike_can_be_rolled_back(
    spiking: Any, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]
) -> None:
    recorder = Recorder()
    spiking("whole", recorder, on_spike="rollback")
    rollback_line = (
        f"loss spike at step {SPIKE_STEP + 1}: rolled back to step 40, continuing with "
        "different batches"
    )
    assert recorder.log_lines[1:] == [rollback_line]
    records = metrics("whole")
    assert [line["step"] for line in records] == list(range(1, 61)), "each step once"
    rollbacks = [line for line in runs.open_run(Path("runs/whole")).history() if "spiked" in line]
    assert [(line["step"], line["spiked"]) for line in rollbacks] == [(40, SPIKE_STEP + 1)]
    assert max(line["loss"] for line in records[40:]) < 1.0
    if not stops:
        return
    for stop_step in stops:
        steps = iter(range(1, 200))
        resumed_step = (
            (runs.open_run(Path("runs/parts")).steps() or [0])[-1] if stop_step != stops[0] else 0
        )
        with monkeypatch.context() as patch:
            script = ScriptedStop(lambda steps=steps, n=stop_step - resumed_step: next(steps) >= n)
            patch.setattr(loop, "catch_stop_signals", lambda script=script: script)
            spiking("parts", on_spike="rollback")
    spiking("parts", on_spike="rollback")
    assert [line["step"] for line in metrics("parts")] == list(range(1, 61))
    expected, actual = final_state("whole"), final_state("parts")
    assert all((value == actual[name]).all() for name, value in expected.items())


class ScriptedStop:
    """Replacement for the stop signals that calls a function."""

    def __init__(self, should_stop: Any) -> None:
        self.should_stop = should_stop

    def __enter__(self) -> Any:
        return self.should_stop

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("until", [60, SPIKE_STEP + 1])
def test_without_a_checkpoint_a_spike_is_skipped(
    spiking: Any, monkeypatch: pytest.MonkeyPatch, until: int
) -> None:
    """Also if training is stopped at the spike."""
    recorder, steps = Recorder(), iter(range(1, 61))
    options = {"on_spike": "rollback", "save_interval": 100, "log_interval": 1}
    with monkeypatch.context() as patch:
        script = ScriptedStop(lambda: next(steps) >= until)
        patch.setattr(loop, "catch_stop_signals", lambda: script)
        assert spiking("a", recorder, **options).step == until
    spiking("a", **options)
    assert "loss spike ignored: there is no checkpoint to roll back to" in recorder.log_lines[1]
    assert [line["step"] for line in metrics("a")] == list(range(1, 61))


def test_repeated_rollbacks_end_training(spiking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TokenArray.get_batch

    def always_noisy(self: TokenArray, step: int, **kwargs: Any) -> Any:
        return original(self, SPIKE_STEP if step >= SPIKE_STEP else step, **kwargs)

    monkeypatch.setattr(TokenArray, "get_batch", always_noisy)
    with pytest.raises(UserError, match="spiked again after 5 rollbacks"):
        spiking("a", on_spike="rollback")
    assert runs.open_run(Path("runs/a")).steps()
