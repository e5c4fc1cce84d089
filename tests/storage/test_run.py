from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxgpt import api
from mlxgpt.backend import safetensors_io
from mlxgpt.storage import checkpoint, loading
from mlxgpt.storage import run as runs
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError
from tests.helpers.failing_files import ERRNOS, failing_open, make_os_error


@pytest.fixture
def runs_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(trained / "runs", tmp_path / "runs"))


def test_a_run_is_found_by_name_by_folder_or_as_the_newest(runs_dir: Path) -> None:
    shutil.copytree(runs_dir / "done", runs_dir / "older")
    for path in (runs_dir / "older").glob("*"):
        os.utime(path, (1, 1))
    (runs_dir / "empty").mkdir()
    assert runs.find_run("older", runs_dir).name == "older"
    assert runs.find_run(str(runs_dir / "older"), runs_dir / "elsewhere").name == "older"
    assert runs.find_run(None, runs_dir).name == "done"
    shutil.copytree(runs_dir / "done", runs_dir / ".other.new")  # killed in the making
    assert {folder.name for folder in runs.list_run_folders(runs_dir)} == {"done", "older"}


def test_without_a_run_it_is_said_where_was_looked(tmp_path: Path, runs_dir: Path) -> None:
    with pytest.raises(UserError, match=f"no trained run in {tmp_path / 'none'}"):
        runs.find_run(None, tmp_path / "none")
    with pytest.raises(UserError, match="there is no run named 'x'"):
        runs.find_run("x", runs_dir)
    shutil.rmtree(runs_dir / "done" / "checkpoints")
    with pytest.raises(UserError, match="no trained run"):
        runs.find_run(None, runs_dir)


def test_which_checkpoint(runs_dir: Path) -> None:
    run = runs.open_run(runs_dir / "done")
    best = run.best()
    assert best is not None
    assert run.checkpoint_path().name == f"step-{best['step']:07d}"
    assert run.checkpoint_path("newest").name == "step-0000012"
    assert run.checkpoint_path("12").name == "step-0000012"
    for which in ("13", "last"):
        with pytest.raises(UserError, match="no checkpoint"):
            run.checkpoint_path(which)
    (run.folder / "best.json").unlink()
    assert run.checkpoint_path().name == "step-0000012", "the newest until there is a best"


def test_a_run_moves_as_a_folder(runs_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    (runs_dir / "done").rename(moved)
    assert runs.open_run(moved).steps()


@pytest.mark.parametrize("damage", ["tokenizer", "newer", "no run", "config"])
def test_what_does_not_belong_together_is_refused(runs_dir: Path, damage: str) -> None:
    folder = runs_dir / "done"
    identity = json.loads((folder / "run.json").read_text())
    if damage == "tokenizer":
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"p"', '"P"'))
    elif damage == "newer":
        (folder / "run.json").write_text(json.dumps({**identity, "format": 99}))
    elif damage == "no run":
        (folder / "run.json").unlink()
    else:
        (folder / "config.toml").write_text("[model]\nn_layers = 2\n")
    problem = {
        "tokenizer": r"tokenizer\.json",
        "newer": "newer mlxgpt",
        "no run": "is not an mlxgpt run",
        "config": "unknown setting 'n_layers'",
    }[damage]
    with pytest.raises(UserError, match=problem):
        runs.open_run(folder)


def test_weights_of_two_heads_are_no_model_of_four(runs_dir: Path) -> None:
    """No array's shape tells of heads, and yet the logits would be others. What was written before
    checkpoints knew of it is read as it is.
    """
    run = runs.open_run(runs_dir / "done")
    loading.load_model(run)
    path = run.folder / "config.toml"
    path.write_text(path.read_text().replace("n_head = 2 ", "n_head = 4 "))
    run = runs.open_run(run.folder)
    assert run.config.model.n_head == 4
    with pytest.raises(UserError, match="different model settings"):
        loading.load_model(run)
    manifest = run.checkpoint_path("best") / checkpoint.MANIFEST_FILE
    tree = json.loads(manifest.read_text())
    del tree["model"], tree[files.CHECKSUM_KEY]
    manifest.write_text(files.dump_checksummed(tree))
    loading.load_model(run)


@pytest.mark.parametrize("name", ["日本語", "a\u3000b", "caf\udce9", "हिन्दी"])
def test_a_run_may_be_trained_on_data_of_any_name(runs_dir: Path, name: str) -> None:
    newest = runs.find_run(None, runs_dir)
    run = replace(newest, folder=runs_dir / "another", data_name=name)
    runs.create_run(run)
    assert runs.open_run(run.folder).data_name == name


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\x1b[2Jb", "a\u202eb", "x" * 256])
def test_a_name_that_no_data_folder_has_is_refused(runs_dir: Path, name: str) -> None:
    run = replace(runs.find_run(None, runs_dir), folder=runs_dir / "another", data_name=name)
    runs.create_run(run)
    with pytest.raises(UserError, match="damaged"):
        runs.open_run(run.folder)


@pytest.mark.parametrize("number", ERRNOS)
def test_a_best_that_cannot_be_read_is_not_unknown(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run = runs.open_run(runs_dir / "done")
    failing_open(monkeypatch, "best.json", number)
    for read in (run.best, run.checkpoint_path, lambda: loading.load_model(run)):
        with pytest.raises(OSError, match=r"best\.json"):
            read()
    loading.load_model(run, "newest")


@pytest.mark.parametrize("content", ["garbage", "{}", ""])
def test_where_best_is_damaged_the_metrics_know_it(runs_dir: Path, content: str) -> None:
    run = runs.open_run(runs_dir / "done")
    best = run.best()
    assert best is not None
    (run.folder / "best.json").write_text(content)
    assert run.best() == best
    (run.folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"best\.json is damaged"):
        run.best()


@pytest.mark.parametrize("number", ERRNOS)
@pytest.mark.parametrize("name", [checkpoint.MANIFEST_FILE, checkpoint.MODEL_FILE, "read", "step"])
def test_another_checkpoint_is_used_only_for_a_damaged_one(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, notes: list[str]
) -> None:
    run = runs.open_run(runs_dir / "done")
    assert len(run.steps()) > 1
    with monkeypatch.context() as patch:
        if name == "read":  # after the hash was found to be right

            def fail_read(file: object, buffer: object) -> int:
                raise OSError(number, os.strerror(number))

            patch.setattr(safetensors_io.ErrorRecordingFile, "readinto", fail_read, raising=False)
        elif name == "step":
            original = os.stat

            def fail_stat(path: Any, *args: Any, **kwargs: Any) -> Any:
                if str(path).endswith("step-0000012"):
                    raise make_os_error(number, path)
                return original(path, *args, **kwargs)

            patch.setattr(os, "stat", fail_stat)
        else:
            failing_open(patch, name, number)
        with pytest.raises(OSError, match=os.strerror(number)) as excinfo:
            loading.load_model(run, "newest")
    assert excinfo.value.errno == number
    assert excinfo.value.filename
    assert notes == []
    path = run.checkpoint_path("newest") / checkpoint.MANIFEST_FILE
    path.unlink()
    _, saved = loading.load_model(run, "newest")
    assert saved.step < 12
    assert "missing or damaged" in notes[0]


def test_what_mlx_cannot_read_is_not_damaged(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own errors have no errno: there may be no memory."""

    def fail_load(*_: object, **__: object) -> None:
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr(mx, "load", fail_load)
    with pytest.raises(UserError, match="out of memory") as excinfo:
        loading.load_model(runs.open_run(runs_dir / "done"))
    assert not isinstance(excinfo.value, checkpoint.DamagedCheckpointError)


@pytest.mark.parametrize("which", ["best", "newest"])
def test_a_damaged_checkpoint_is_never_handed_out_as_another(
    runs_dir: Path, tmp_path: Path, which: str
) -> None:
    run = runs.open_run(runs_dir / "done")
    weights = run.checkpoint_path(which) / checkpoint.MODEL_FILE
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="missing or damaged") as excinfo:
        api.export(
            to="hf", run="done", runs_dir=runs_dir, checkpoint=which, out=tmp_path / "exported"
        )
    assert "--checkpoint" in excinfo.value.remedy
    assert not (tmp_path / "exported").exists()
    api.generate(run="done", runs_dir=runs_dir, checkpoint=which, max_tokens=1)


@pytest.mark.parametrize("number", ERRNOS)
@pytest.mark.parametrize("name", ["run.json", "best.json", "stat"])
def test_a_run_that_cannot_be_read_is_named_in_the_list(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str], name: str, number: int
) -> None:
    """It is not left out in silence, the others are listed, and no other one is the newest."""
    shutil.copytree(runs_dir / "done", runs_dir / "other")
    real_open, real_stat = Path.open, os.stat

    def open_or_fail(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == runs_dir / "done" / name:
            raise make_os_error(number, path)
        return real_open(path, *args, **kwargs)

    def stat_or_fail(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path) == str(runs_dir / "done" / "run.json"):
            raise make_os_error(number, path)
        return real_stat(path, *args, **kwargs)

    if name == "stat":
        monkeypatch.setattr(os, "stat", stat_or_fail)
    else:
        monkeypatch.setattr(Path, "open", open_or_fail)
    assert [line.name for line in api.runs(runs_dir=runs_dir)] == ["other"]
    assert len(notes) == 1
    assert re.search(rf"cannot read .*done.*: {os.strerror(number)}", notes[0])
    if name == "stat":
        with pytest.raises(OSError, match="done"):
            runs.find_run(None, runs_dir)


@pytest.mark.parametrize("number", ERRNOS)
def test_a_folder_is_replaced_only_where_it_has_no_checkpoint_for_certain(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run = runs.open_run(runs_dir / "done")
    before = sorted(run.folder.rglob("*"))
    with pytest.raises(UserError, match="already contains checkpoints"):
        runs.create_run(run)
    original = Path.iterdir

    def iterdir_or_fail(path: Path) -> Any:
        if path == run.checkpoints:
            raise make_os_error(number, path)
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", iterdir_or_fail)
        with pytest.raises(OSError, match="checkpoints"):
            runs.create_run(run)
    assert sorted(run.folder.rglob("*")) == before


@pytest.mark.skipif(sys.platform != "linux", reason="macOS allows only names of UTF-8")
def test_a_name_need_not_be_utf8(runs_dir: Path) -> None:
    """MLX writes and reads files of Python's, and knows no name."""
    folder = runs_dir / "caf\udce9"
    (runs_dir / "done").rename(folder)
    run = runs.open_run(folder)
    _, saved = loading.load_model(run)
    run.save(run.checkpoints, 99, saved.parameters, {})
    assert run.steps()[-1] == 99
    api.export(to="hf", run=str(folder), out=folder / "hf\udce9")
    assert (folder / "hf\udce9" / "model.safetensors").exists()
