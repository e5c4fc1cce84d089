from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlxgpt import tracking
from mlxgpt.errors import UserError
from mlxgpt.training.callback import Callback
from mlxgpt.training.hooks import Hooks
from tests.commands import Capture, refused
from tests.trainings import Recorder


def test_what_is_not_there_is_said_before_anything_is_done(place: Path, capsys: Capture) -> None:
    line = ["train", "--tier", "1", "--source", "words.txt"]
    assert "there is no tracker paper" in refused(capsys, *line, "--report-to", "paper")


@pytest.mark.parametrize("to", tracking.GET)
def test_how_to_get_one_is_said(to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{to} is not installed") as caught:
        tracking.Tracker(to, Callback())
    assert "pip install" in caught.value.remedy


class Runs:
    """Stands for the package wandb: what its functions were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        module = ModuleType("wandb")
        module.init = self.init  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wandb", module)
        find: Callable[[str], Any] = importlib.util.find_spec
        monkeypatch.setattr(tracking, "find_spec", lambda n: True if n == "wandb" else find(n))

    def init(self, **given: Any) -> Runs:
        self.begun.append(given)
        return self

    def log(self, numbers: dict[str, float], *, step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.finished += 1


def test_it_gets_the_records_and_all_else_goes_on(
    train: Any, no_check: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, recorder = Runs(monkeypatch), Recorder()
    train("a", recorder, report_to="wandb", max_steps=12)
    assert [step for step, _ in there.logged] == [record["step"] for record in recorder.records]
    step, numbers = there.logged[-1]
    assert (step, numbers["val_loss"]) == (12, recorder.records[-1]["val_loss"])
    assert "step" not in numbers
    assert all(isinstance(value, float) for value in numbers.values())
    assert there.begun[0]["name"] == "a"
    assert there.begun[0]["config"]["train"]["max_steps"] == 12
    assert there.finished == 1
    assert recorder.samples, "and the display saw the rest"


def test_a_resumed_run_goes_on_there_and_an_error_closes_it(
    train: Any, no_check: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Runs(monkeypatch)
    save = Hooks._save

    def full(self: Hooks, metrics: Any) -> None:
        save(self, metrics)
        if metrics.step == 8:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Hooks, "_save", full)
        with pytest.raises(OSError, match="No space"):
            train("a", report_to="wandb")
    assert there.finished == 1
    train("a", report_to="wandb")
    first, second = there.begun
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    train("b", report_to="wandb")
    assert there.begun[2]["id"] != first["id"]
