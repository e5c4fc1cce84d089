from __future__ import annotations

import json
import random
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.config import Config
from mlxgpt.data.token_array import Batch
from mlxgpt.model.gpt import GPT
from mlxgpt.storage import checkpoint
from mlxgpt.storage.checkpoint import MANIFEST_FILE, MODEL_FILE, OPTIMIZER_FILE, Checkpoint
from mlxgpt.training.step import TrainStep
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError


@pytest.fixture
def step(tiny_model: Config) -> TrainStep:
    """A training step after one update, so that the moments are not zero."""
    step = TrainStep(GPT(tiny_model.model, 5), tiny_model)
    ids = mx.random.randint(0, 19, (1, 4, 9), key=mx.random.key(0))
    mx.eval(step(Batch(ids[..., :-1], ids[..., 1:]), mx.array(1e-2), mx.random.key(0)), step.state)
    return step


def save_step(folder: Path, step: TrainStep, number: int = 3) -> Path:
    content = Checkpoint(number, "gpt", "abc", {"loss": 1.5}, {"skipped": 2}, *step.state_dicts())
    return checkpoint.save_checkpoint(folder, content)


def test_save_and_load_are_bit_exact(tmp_path: Path, step: TrainStep) -> None:
    path = save_step(tmp_path, step)
    assert path.name == "step-0000003"
    loaded = checkpoint.load_checkpoint(path, with_optimizer=True)
    assert (loaded.step, loaded.metrics) == (3, {"loss": 1.5})
    assert (loaded.model, loaded.tokenizer) == ("gpt", "abc")
    assert loaded.guard == {"skipped": 2}
    assert loaded.optimizer is not None
    for expected, actual in zip(
        step.state_dicts(), (loaded.parameters, loaded.optimizer), strict=True
    ):
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            assert (value.dtype, value.shape) == (actual[name].dtype, actual[name].shape)
            assert (np.array(value) == np.array(actual[name])).all(), name
    assert checkpoint.load_checkpoint(path).optimizer is None


def test_a_checkpoint_contains_only_safetensors_and_json(tmp_path: Path, step: TrainStep) -> None:
    names = {path.name for path in save_step(tmp_path, step).iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "manifest.json"}


@pytest.mark.parametrize("name", [MODEL_FILE, OPTIMIZER_FILE])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty"])
def test_a_damaged_file_is_refused(tmp_path: Path, step: TrainStep, name: str, damage: str) -> None:
    path = save_step(tmp_path, step) / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"flip": content, "cut": content[:-9], "empty": bytearray()}[damage])
    with pytest.raises(UserError, match="missing or damaged"):
        checkpoint.load_checkpoint(path.parent, with_optimizer=True)


def test_500_changed_bytes_are_all_detected(tmp_path: Path, step: TrainStep) -> None:
    """One byte at a time, anywhere in the three files."""
    path, rng = save_step(tmp_path, step), random.Random(7)
    content = {
        name: (path / name).read_bytes() for name in (MODEL_FILE, OPTIMIZER_FILE, MANIFEST_FILE)
    }
    positions = [
        (name, offset)
        for name, file_content in content.items()
        for offset in range(len(file_content))
    ]
    manifest_positions = [position for position in positions if position[0] == MANIFEST_FILE]
    for name, offset in [*rng.sample(positions, 350), *rng.sample(manifest_positions, 150)]:
        damaged = bytearray(content[name])
        damaged[offset] ^= rng.randrange(1, 256)
        (path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=r"missing or damaged|newer mlxgpt"):
            checkpoint.load_checkpoint(path, with_optimizer=True)
        (path / name).write_bytes(content[name])
    checkpoint.load_checkpoint(path, with_optimizer=True)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": "x"}', "\0"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, step: TrainStep, content: str) -> None:
    path = save_step(tmp_path, step)
    (path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="missing or damaged"):
        checkpoint.load_checkpoint(path)


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path, step: TrainStep) -> None:
    path = save_step(tmp_path, step) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match="newer mlxgpt"):
        checkpoint.load_checkpoint(path.parent)


@pytest.mark.parametrize("at", ["save_safetensors", "second file", "sync", "rename"])
def test_a_failure_while_writing_loses_nothing(
    tmp_path: Path, step: TrainStep, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    save_step(tmp_path, step)
    original, calls = mx.save_safetensors, []

    def fail_disk_full(*args: object, **_: object) -> None:
        calls.append(args)
        if at == "second file" and len(calls) == 1:
            original(*args)  # type: ignore[arg-type]
            return
        raise OSError(28, "No space left on device")

    if at in ("save_safetensors", "second file"):
        monkeypatch.setattr(mx, "save_safetensors", fail_disk_full)
    elif at == "sync":
        monkeypatch.setattr(files, "fsync_path", fail_disk_full)
    else:
        monkeypatch.setattr(Path, "rename", fail_disk_full)
    with pytest.raises(UserError, match="No space left on device"):
        save_step(tmp_path, step, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000003"]
    checkpoint.load_checkpoint(tmp_path / "step-0000003", with_optimizer=True)


def test_a_checkpoint_is_synced_before_it_is_renamed(
    tmp_path: Path, step: TrainStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the files, then the scratch folder, and the parent folder after the rename."""
    events: list[str] = []
    sync, rename = files.fsync_path, Path.rename

    def record_sync(path: Path) -> None:
        events.append("scratch" if path.name.startswith(".writing-") else path.name)
        sync(path)

    def record_rename(path: Path, target: Path) -> Path:
        events.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(files, "fsync_path", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    (tmp_path / "checkpoints").mkdir()
    save_step(tmp_path / "checkpoints", step)
    assert set(events[:3]) == {MODEL_FILE, OPTIMIZER_FILE, MANIFEST_FILE}
    assert events[3:] == ["scratch", "renamed", "checkpoints"]


def test_pruning_keeps_the_given_steps_and_removes_leftovers(
    tmp_path: Path, step: TrainStep
) -> None:
    for number in (1, 2, 3, 12_345_678):
        save_step(tmp_path, step, number)
    (tmp_path / ".writing-x").mkdir()
    (tmp_path / f".step-0000007{files.TRASH_SUFFIX}").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoint.list_steps(tmp_path) == [1, 2, 3, 12_345_678]
    checkpoint.prune_checkpoints(tmp_path, {2, 12_345_678})
    assert checkpoint.list_steps(tmp_path) == [2, 12_345_678]
    assert (tmp_path / "notes").exists()
    assert not list(tmp_path.glob(".*")), "what an interrupted writing or deleting left"


def test_a_checkpoint_named_after_another_step_is_refused(tmp_path: Path, step: TrainStep) -> None:
    path = save_step(tmp_path, step, 3)
    path.rename(checkpoint.checkpoint_folder(tmp_path, 4))
    with pytest.raises(UserError, match="its manifest is for step 3"):
        checkpoint.load_checkpoint(checkpoint.checkpoint_folder(tmp_path, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_nonfinite_weights_are_reported(
    tmp_path: Path, step: TrainStep, value: float, dtype: mx.Dtype
) -> None:
    parameters, optimizer = step.state_dicts()
    parameters = {name: array.astype(dtype) for name, array in parameters.items()}
    parameters["h.0.mlp.c_fc.weight"][1, 2] = value
    path = checkpoint.save_checkpoint(
        tmp_path, Checkpoint(3, "gpt", "abc", {}, {}, parameters, optimizer)
    )
    with pytest.raises(
        checkpoint.DamagedCheckpointError, match=r"h\.0\.mlp\.c_fc\.weight contains non-finite"
    ):
        checkpoint.load_checkpoint(path)
