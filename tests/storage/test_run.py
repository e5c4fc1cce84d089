from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mlxgpt import files
from mlxgpt.errors import UserError
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs


@pytest.fixture
def runs_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(trained / "runs", tmp_path / "runs"))


def test_a_run_is_found_by_name_by_folder_or_as_the_newest(runs_dir: Path) -> None:
    shutil.copytree(runs_dir / "done", runs_dir / "older")
    for path in (runs_dir / "older").glob("*"):
        os.utime(path, (1, 1))
    (runs_dir / "empty").mkdir()
    assert runs.find("older", runs_dir).name == "older"
    assert runs.find(str(runs_dir / "older"), runs_dir / "elsewhere").name == "older"
    assert runs.find(None, runs_dir).name == "done"
    shutil.copytree(runs_dir / "done", runs_dir / ".other.new")  # killed in the making
    assert {folder.name for folder in runs.folders_in(runs_dir)} == {"done", "older"}


def test_without_a_run_it_is_said_where_was_looked(tmp_path: Path, runs_dir: Path) -> None:
    with pytest.raises(UserError, match=f"no trained run in {tmp_path / 'none'}"):
        runs.find(None, tmp_path / "none")
    with pytest.raises(UserError, match="there is no run 'x'"):
        runs.find("x", runs_dir)
    shutil.rmtree(runs_dir / "done" / "checkpoints")
    with pytest.raises(UserError, match="no trained run"):
        runs.find(None, runs_dir)


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
    (run.folder / "best.json").write_text("garbage")
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
        "no run": "is not a run",
        "config": "unknown setting 'n_layers'",
    }[damage]
    with pytest.raises(UserError, match=problem):
        runs.open_run(folder)


def test_weights_of_two_heads_are_no_model_of_four(runs_dir: Path) -> None:
    """No array's shape tells of heads, and yet the logits would be others. What was written before
    checkpoints knew of it is read as it is.
    """
    run = runs.open_run(runs_dir / "done")
    runs.load_model(run)
    path = run.folder / "config.toml"
    path.write_text(path.read_text().replace("n_head = 2 ", "n_head = 4 "))
    run = runs.open_run(run.folder)
    assert run.config.model.n_head == 4
    with pytest.raises(UserError, match="other settings of the model"):
        runs.load_model(run)
    manifest = run.checkpoint_path("best") / checkpoint.MANIFEST
    tree = json.loads(manifest.read_text())
    del tree["model"], tree[files.SEAL]
    manifest.write_text(files.sealed(tree))
    runs.load_model(run)


@pytest.mark.parametrize("name", ["日本語", "a\u3000b", "caf\udce9", "हिन्दी"])
def test_a_run_may_be_trained_on_data_of_any_name(runs_dir: Path, name: str) -> None:
    found = runs.find(None, runs_dir)
    run = replace(found, folder=runs_dir / "another", data_name=name)
    runs.create(run)
    assert runs.open_run(run.folder).data_name == name


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\x1b[2Jb", "a\u202eb", "x" * 256])
def test_a_name_that_no_data_folder_has_is_refused(runs_dir: Path, name: str) -> None:
    run = replace(runs.find(None, runs_dir), folder=runs_dir / "another", data_name=name)
    runs.create(run)
    with pytest.raises(UserError, match="damaged"):
        runs.open_run(run.folder)
