from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rich.filesize import decimal

from mlxgpt import api
from mlxgpt.cli.training_display import TrainingDisplay
from mlxgpt.evaluation.loss import Evaluation
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.training import checkpointer, run_writer, validation
from mlxgpt.utils.errors import UserError
from tests.helpers.training_runs import Recorder, final_state, metrics

pytestmark = pytest.mark.usefixtures("no_check")
CHECKPOINTS = Path("runs/a/checkpoints")


def set_free_disk_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


@pytest.mark.exact_bits
def test_training_continues_while_a_checkpoint_is_written(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing step 4 takes until step 7 is done, and still saves the weights of step 4."""
    train("whole", eval_interval=100, log_interval=1)
    original, step_7_logged, threads = checkpoint.save_checkpoint, threading.Event(), []

    def slow_save(folder: Path, content: checkpoint.Checkpoint, **kwargs: Any) -> Path:
        threads.append(threading.current_thread())
        assert content.step != 4 or step_7_logged.wait(60)
        return original(folder, content, **kwargs)

    log = run_writer.RunWriter.log

    def log_and_signal(self: run_writer.RunWriter, record: dict[str, Any]) -> None:
        log(self, record)
        if record["step"] == 7:
            step_7_logged.set()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", slow_save)
        patch.setattr(run_writer.RunWriter, "log", log_and_signal)
        train("a", eval_interval=100, log_interval=1, keep_checkpoints=9)
    assert threading.main_thread() not in threads
    shutil.rmtree(CHECKPOINTS / "step-0000012")
    shutil.rmtree(CHECKPOINTS / "step-0000008")
    train("a", eval_interval=100, log_interval=1)
    expected, actual = final_state("whole"), final_state("a")
    assert all((value == actual[name]).all() for name, value in expected.items())


@pytest.mark.parametrize(("keep", "left"), [(1, [24]), (2, [20, 24]), (3, [16, 20, 24])])
def test_the_newest_and_the_best_checkpoints_are_kept(
    train: Any, monkeypatch: pytest.MonkeyPatch, keep: int, left: list[int]
) -> None:
    losses = iter([3.0, 2.0, 1.0, 4.0, 5.0, 6.0])

    def validate(self: Any, step: int) -> tuple[Evaluation, Evaluation, None]:
        result = Evaluation(next(losses), bits_per_byte=1.0, perplexity=1.0, tokens=9)
        return result, result, None

    monkeypatch.setattr(validation.Validation, "__call__", validate)
    train("a", max_steps=24, keep_checkpoints=keep)
    assert checkpoint.list_steps(CHECKPOINTS) == sorted({12, *left})


def test_logs_are_synced_before_each_checkpoint_and_at_the_end(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, save = runs.Run.sync_logs, checkpoint.save_checkpoint

    def record_sync(self: runs.Run) -> None:
        events.append("notes")
        sync(self)

    def record_save(folder: Path, content: checkpoint.Checkpoint, **kwargs: Any) -> Path:
        events.append(f"step {content.step}")
        return save(folder, content, **kwargs)

    monkeypatch.setattr(runs.Run, "sync_logs", record_sync)
    monkeypatch.setattr(checkpoint, "save_checkpoint", record_save)
    train("a", snapshots=False)
    assert events == ["notes", "step 4", "notes", "step 8", "notes", "step 12", "notes"]


def test_best_is_recorded_after_its_checkpoint_is_written(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake executor writes only when waited for."""

    class LazyExecutor:
        def __init__(self, *_: object) -> None: ...

        def submit(self, write: Callable[[], None]) -> SimpleNamespace:
            return SimpleNamespace(result=write, done=lambda: False)

        def shutdown(self, wait: bool) -> None: ...

    original, was_saved = runs.Run.set_best, []

    def record_set_best(self: runs.Run, step: int, val_loss: float) -> None:
        was_saved.append(step in self.steps())
        original(self, step, val_loss)

    monkeypatch.setattr(checkpointer, "ThreadPoolExecutor", LazyExecutor)
    monkeypatch.setattr(runs.Run, "set_best", record_set_best)
    train("a")
    assert was_saved
    assert all(was_saved)


def test_a_failed_checkpoint_write_ends_training(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint.save_checkpoint

    def save_or_fail(folder: Path, content: checkpoint.Checkpoint, **kwargs: Any) -> Path:
        if content.step == 8:
            raise UserError("cannot write it: No space left on device", "free some space.")
        return original(folder, content, **kwargs)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_or_fail)
    with pytest.raises(UserError, match="No space left"):
        train("a", max_steps=1000, eval_interval=1000, sample_tokens=0)
    assert checkpoint.list_steps(CHECKPOINTS)[-1] < 100, "it did not go on for long"


@pytest.mark.exact_bits
def test_a_nearly_full_disk_saves_and_ends_training(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("whole")
    size = sum(p.stat().st_size for p in Path("runs/whole/checkpoints/step-0000012").iterdir())
    with monkeypatch.context() as patch:
        set_free_disk_bytes(patch, int(1.5 * size) + (1 << 20))
        with pytest.raises(UserError, match="nearly full: saved step 4 and stopped") as excinfo:
            train("a")
    assert "free some space" in excinfo.value.remedy
    assert checkpoint.list_steps(CHECKPOINTS) == [4]
    assert train("a").step == 12
    expected, actual = final_state("whole"), final_state("a")
    assert all((value == actual[name]).all() for name, value in expected.items())
    assert metrics("a") == metrics("whole")


def test_a_full_disk_keeps_existing_checkpoints(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("a", max_steps=8, decay_steps=12)
    before = {p: p.read_bytes() for p in CHECKPOINTS.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        set_free_disk_bytes(patch, 1000)
        with pytest.raises(UserError, match="the disk is full: 0 MB free") as excinfo:
            train("a", max_steps=12, decay_steps=12)
    assert "resumes from step 8." in excinfo.value.remedy
    assert {p: p.read_bytes() for p in CHECKPOINTS.rglob("*") if p.is_file()} == before
    assert train("a", max_steps=12, decay_steps=12).step == 12


def test_a_damaged_best_checkpoint_falls_back_to_another(train: Any, notes: list[str]) -> None:
    train("a")
    run = runs.open_run(Path("runs/a"))
    weights = run.checkpoint_path("best") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    notes.clear()
    assert api.generate(run="a", max_tokens=3).tokens == 3
    assert "is missing or damaged: model.safetensors was modified" in notes[0]
    assert notes[1].startswith("runs/a, step ")


def test_a_damaged_only_checkpoint_is_an_error(train: Any) -> None:
    train("a", eval_interval=12, save_interval=12)
    weights = CHECKPOINTS / "step-0000012/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="is missing or damaged") as excinfo:
        api.generate(run="a")
    assert "the only checkpoint of this run" in excinfo.value.remedy


def test_saving_is_reported_with_size_and_time(
    train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    class SaveRecorder(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: list[tuple[int, int]] = []

        def on_save(self, step: int, size: int, seconds: float) -> None:
            self.sizes.append((step, size))
            assert 0 < seconds < 60

    recorder = SaveRecorder()
    train("a", recorder)
    arrays = final_state("a").values()
    assert recorder.sizes == [(step, sum(array.nbytes for array in arrays)) for step in (4, 8, 12)]
    train("b", TrainingDisplay())
    assert f"{decimal(recorder.sizes[0][1])} in 0." in capsys.readouterr().err


@pytest.mark.exact_bits
def test_training_does_not_depend_on_the_time_of_day(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    train("whole")

    def fail_on_time() -> float:
        raise AssertionError("the time of day was asked for")

    monkeypatch.setattr(time, "time", fail_on_time)
    train("a")
    assert metrics("a") == metrics("whole")


def test_arrays_are_not_overwritten_by_later_steps(train: Any) -> None:

    array = mx.ones(1000)
    step = mx.compile(lambda x: x * 2)
    snapshot = array
    for _ in range(5):
        array = step(array)
        mx.eval(array)
    assert (np.array(snapshot) == 1).all()
