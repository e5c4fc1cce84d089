"""Training runs whose GPU fails: simulated on the CPU by errors where the device is waited for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxgpt import api
from mlxgpt.errors import UserError
from mlxgpt.machine import compiler
from mlxgpt.storage import run as runs
from mlxgpt.training import existing, launch, session
from mlxgpt.training.forecast import Forecast
from tests.trainings import Recorder, final_state, metrics

pytestmark = pytest.mark.usefixtures("no_check", "planned")

METAL = "[METAL] Command buffer execution failed: "
WATCHDOG = (
    f"{METAL}Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."
)
MEMORY = f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
IGNORED = (
    f"{METAL}Ignored (for causing prior/excessive GPU errors) "
    "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)."
)
SHORT = {
    "max_steps": 3,
    "eval_interval": 2,
    "save_interval": 2,
    "log_interval": 1,
    "sample_tokens": 2,
    "eval_tokens": 16,
}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed forecast: how many steps are timed would depend on the machine."""
    forecast = Forecast(0.01, 1e-5, 1, 100)
    monkeypatch.setattr(launch, "measure", lambda *_: forecast)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before retries, which take no time."""
    taken: list[float] = []
    monkeypatch.setattr(session, "pause", taken.append)
    return taken


class Waits:
    """Counts where the device is waited for; `fails` says at which of them, and with what text."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.fails: Callable[[int], str | None] = lambda number: None
        for owner, names in (
            (mx, ("eval", "async_eval")),
            (mx.array, ("__float__", "__bool__", "__int__", "tolist", "item")),
        ):
            for name in names:
                patch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*arrays: Any) -> Any:
            self.count += 1
            if text := self.fails(self.count):
                raise RuntimeError(text)
            return function(*arrays)

        return waiting

    def fail_once(self, at: int, text: str = WATCHDOG) -> None:
        self.count = 0
        self.fails = lambda number: text if number == at else None


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    with monkeypatch.context() as patch:
        yield Waits(patch)


def same_run(one: str, other: str) -> None:
    """Both have the same bits, metrics, samples and best checkpoint."""
    assert metrics(one) == metrics(other)
    samples = [(Path("runs") / run / "samples.txt").read_text() for run in (one, other)]
    assert samples[0] == samples[1]
    assert runs.open_run(Path("runs") / one).best() == runs.open_run(Path("runs") / other).best()
    first, second = final_state(one), final_state(other)
    assert first.keys() == second.keys()
    assert all((value == second[name]).all() for name, value in first.items())


def test_a_failure_at_any_wait_changes_no_bit(
    train: Any, waits: Waits, pauses: list[float]
) -> None:
    train("whole", **SHORT)  # which also measures this machine, once
    waits.count = 0
    train("again", **SHORT)
    total = waits.count
    assert total > 40
    for at in range(1, total + 1):
        waits.fail_once(at)
        run = f"failed-{at}"
        summary = train(run, **SHORT)
        assert (summary.step, summary.interrupted, summary.resumed) == (3, False, False)
        assert waits.count > total, "it did fail"
        same_run("whole", run)
    assert pauses == [5.0] * total
