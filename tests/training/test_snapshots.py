from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlxgpt import api
from mlxgpt.loaded_model import load
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.training import snapshots
from mlxgpt.training.snapshots import is_snapshot_step
from mlxgpt.utils.errors import UserError
from tests.helpers.training_runs import Recorder

pytestmark = pytest.mark.usefixtures("no_check")


def snapshot_steps(run: str) -> list[int]:
    return checkpoint.list_steps(Path("runs") / run / "snapshots")


def test_snapshot_steps() -> None:
    steps = [step for step in range(0, 10_000) if is_snapshot_step(step)]
    assert steps == [0, 100, 200, 400, 800, 1600, 3200, 6400]


@pytest.fixture
def young(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "FIRST_SNAPSHOT_STEP", 3)


@pytest.mark.usefixtures("young")
def test_a_snapshot_matches_the_checkpoint_of_its_step(train: Any) -> None:
    """Within the rounding of 16-bit weights."""
    train("a", keep_checkpoints=9, eval_interval=3, save_interval=3)
    assert snapshot_steps("a") == [0, 3, 6, 12]
    run = runs.open_run(Path("runs/a"))
    assert run.saved_steps() == [0, 3, 6, 9, 12]
    for step in (3, 6, 12):
        snapshot = checkpoint.load_checkpoint(
            checkpoint.checkpoint_folder(run.snapshots, step)
        ).parameters
        full = checkpoint.load_checkpoint(
            checkpoint.checkpoint_folder(run.checkpoints, step)
        ).parameters
        assert snapshot.keys() == full.keys()
        for name, value in snapshot.items():
            assert value.dtype.size == 2
            np.testing.assert_allclose(
                value.astype(full[name].dtype), full[name], rtol=1e-3, atol=1e-6
            )


@pytest.mark.usefixtures("young")
def test_a_snapshot_can_be_loaded_like_a_checkpoint(train: Any) -> None:
    train("a")
    for step in (0, 3):
        model = load("a", checkpoint=str(step))
        assert model.step == step
        assert model._model.wte.weight.dtype.size == 4
    assert load("a").step == 12
    assert len(api.generate("to", run="a", checkpoint="3", seed=1, max_tokens=5).texts[0]) >= 2
    with pytest.raises(UserError) as excinfo:
        load("a", checkpoint="5")
    assert "0, 3, 6, 8, 12" in excinfo.value.remedy


@pytest.mark.usefixtures("young")
def test_a_resumed_run_has_the_same_snapshots(train: Any) -> None:
    train("whole")
    train("a", max_steps=4, decay_steps=12)
    train("a", decay_steps=12)
    assert snapshot_steps("a") == snapshot_steps("whole") == [0, 3, 6, 12]


def test_snapshots_can_be_disabled(train: Any) -> None:
    train("a", snapshots=False)
    assert not Path("runs/a/snapshots").exists()


def test_snapshots_are_disabled_if_they_would_fill_the_disk(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    recorder = Recorder()
    with pytest.raises(UserError, match="disk is"):
        train("a", recorder)
    assert any("snapshots disabled: they would take" in line for line in recorder.log_lines)
    assert not Path("runs/a/snapshots").exists()


@pytest.mark.usefixtures("young")
def test_training_continues_if_a_snapshot_cannot_be_written(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint.save_checkpoint

    def save_or_fail(folder: Path, *args: Any, **kwargs: Any) -> Path:
        if folder.name == "snapshots":
            raise UserError("cannot write there", "free some space.")
        return original(folder, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_or_fail)
    recorder = Recorder()
    assert train("a", recorder).step == 12
    assert recorder.log_lines.count("snapshots disabled: cannot write there") >= 1
