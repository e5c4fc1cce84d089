"""Runs whose folder is deleted, moved or replaced during training."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxgpt import api
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.training import snapshots
from mlxgpt.utils.errors import UserError
from tests.helpers.training_runs import final_state

pytestmark = pytest.mark.usefixtures("no_check")
RUN_FOLDER = Path("runs/a")
FOLDER_GONE_MESSAGE = r"the run folder runs/a no longer exists: training stopped"


def change_at_step_8(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[], object]
) -> None:
    """Change the folder just before the run writes its second checkpoint, sample or record."""
    owner = checkpoint if name == "save_checkpoint" else runs.Run
    original: Any = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        step = {"log": lambda: args[1]["step"], "save_checkpoint": lambda: args[1].step}.get(
            name, lambda: args[1]
        )()
        if step == 8:
            change()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


def replace_folder() -> None:
    RUN_FOLDER.rename("moved")
    RUN_FOLDER.mkdir()
    (RUN_FOLDER / "mine.txt").write_text("mine")


@pytest.mark.parametrize("name", ["log", "add_sample", "set_best", "save_checkpoint"])
@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda: shutil.rmtree(RUN_FOLDER), []),
        (lambda: RUN_FOLDER.rename("moved"), []),
        (replace_folder, ["a", "a/mine.txt"]),
    ],
    ids=["deleted", "moved", "replaced"],
)
@pytest.mark.exact_bits
def test_training_stops_and_writes_nothing_if_the_folder_is_gone(
    train: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Callable[[], object],
    left: list[str],
) -> None:
    monkeypatch.setattr(runs.Run, "best", lambda run: None)  # each evaluation is the best
    with monkeypatch.context() as patch:
        change_at_step_8(patch, name, change)
        with pytest.raises(UserError, match=FOLDER_GONE_MESSAGE) as excinfo:
            train("a", max_steps=1000, decay_steps=12)
    assert "--run FOLDER" in excinfo.value.remedy
    remaining = sorted(str(path.relative_to("runs")) for path in Path("runs").rglob("*"))
    assert remaining == left, "nothing was written in the former place"
    if Path("moved").exists():
        train(os.path.join(".", "moved"), decay_steps=12)
        train("b", decay_steps=12)
        shutil.copytree("moved", "runs/moved")
        for array, value in final_state("b").items():
            assert (final_state("moved")[array] == value).all(), array


def test_a_checkpoint_written_during_deletion_is_removed(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rm -rf` leaves a checkpoint that is renamed after it listed the folder."""
    original = checkpoint.save_checkpoint

    def save_then_delete(folder: Path, content: checkpoint.Checkpoint, **kwargs: Any) -> Path:
        path = original(folder, content, **kwargs)
        if content.step == 8:
            for entry in RUN_FOLDER.iterdir():
                if entry.is_file():
                    entry.unlink()
            for step_folder in (RUN_FOLDER / "checkpoints").iterdir():
                if step_folder != path:
                    shutil.rmtree(step_folder)
        return path

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_then_delete)
    with pytest.raises(UserError, match=FOLDER_GONE_MESSAGE):
        train("a", max_steps=1000, snapshots=False)
    assert list(Path("runs").iterdir()) == []


@pytest.mark.parametrize("name", ["run.json", "run.json and all that describes it"])
def test_checkpoints_are_kept_if_only_run_files_are_deleted(
    train: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    names = ["run.json"] if name == "run.json" else ["run.json", "config.toml", "tokenizer.json"]

    def change() -> None:
        for file_name in names:
            (RUN_FOLDER / file_name).unlink()

    change_at_step_8(monkeypatch, "add_sample", change)
    with pytest.raises(UserError, match=FOLDER_GONE_MESSAGE):
        train("a", max_steps=1000, keep_checkpoints=9)
    steps = checkpoint.list_steps(RUN_FOLDER / "checkpoints")
    assert steps[:2] == [4, 8]
    checkpoint.load_checkpoint(checkpoint.checkpoint_folder(RUN_FOLDER / "checkpoints", 8))


def test_a_snapshot_does_not_recreate_a_deleted_folder(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "FIRST_SNAPSHOT_STEP", 8)
    original = runs.Run.save

    def delete_then_save(run: runs.Run, folder: Path, step: int, *args: Any, **kwargs: Any) -> None:
        if folder.name == "snapshots" and step == 8:
            shutil.rmtree(RUN_FOLDER)
        original(run, folder, step, *args, **kwargs)

    monkeypatch.setattr(runs.Run, "save", delete_then_save)
    with pytest.raises(UserError, match=FOLDER_GONE_MESSAGE):
        train("a", max_steps=1000)
    assert list(Path("runs").iterdir()) == []


def test_a_run_deleted_after_its_last_write_is_an_error(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = runs.Run.sync_logs

    def sync_then_delete(run: runs.Run) -> None:
        original(run)
        if run.steps() == [8, 12]:
            shutil.rmtree(RUN_FOLDER)

    monkeypatch.setattr(runs.Run, "sync_logs", sync_then_delete)
    with pytest.raises(UserError, match=FOLDER_GONE_MESSAGE):
        train("a")


def test_a_comparison_stops_if_its_folder_is_gone(
    home: Path, tiny: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings_folder = Path("runs/compare/trainings")
    change_at_step_8(monkeypatch, "log", lambda: shutil.rmtree(trainings_folder))
    with pytest.raises(UserError, match="no longer exists: training stopped"):
        api.compare(
            vary="learning_rate=0.01,0.02",
            budget="12steps",
            config=tiny,
            source=text_file,
            seeds=1,
        )
    assert not list(trainings_folder.rglob("*.safetensors"))
