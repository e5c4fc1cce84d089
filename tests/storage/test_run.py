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
from mlxgpt.utils import json_files
from mlxgpt.utils.errors import UserError
from tests.helpers.failing_files import ERRNOS, failing_open, make_os_error


@pytest.fixture
def runs_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, for modification."""
    return Path(shutil.copytree(trained / "runs", tmp_path / "runs"))


def test_find_run_by_name_by_folder_or_newest(runs_dir: Path) -> None:
    shutil.copytree(runs_dir / "done", runs_dir / "older")
    for path in (runs_dir / "older").glob("*"):
        os.utime(path, (1, 1))
    (runs_dir / "empty").mkdir()
    assert runs.find_run("older", runs_dir).name == "older"
    assert runs.find_run(str(runs_dir / "older"), runs_dir / "elsewhere").name == "older"
    assert runs.find_run(None, runs_dir).name == "done"
    shutil.copytree(runs_dir / "done", runs_dir / ".other.new")  # as after a kill during creation
    assert {folder.name for folder in runs.list_run_folders(runs_dir)} == {"done", "older"}


def test_a_missing_run_is_reported_with_the_searched_folder(tmp_path: Path, runs_dir: Path) -> None:
    with pytest.raises(UserError, match=f"no trained run in {tmp_path / 'none'}"):
        runs.find_run(None, tmp_path / "none")
    with pytest.raises(UserError, match="there is no run named 'x'"):
        runs.find_run("x", runs_dir)
    shutil.rmtree(runs_dir / "done" / "checkpoints")
    with pytest.raises(UserError, match="no trained run"):
        runs.find_run(None, runs_dir)


def test_checkpoint_path_selects_best_newest_or_step(runs_dir: Path) -> None:
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


def test_a_run_folder_can_be_moved(runs_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    (runs_dir / "done").rename(moved)
    assert runs.open_run(moved).steps()


@pytest.mark.parametrize("damage", ["tokenizer", "newer", "no run", "config"])
def test_inconsistent_run_files_are_refused(runs_dir: Path, damage: str) -> None:
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
    with pytest.raises(UserError, match=problem) as excinfo:
        runs.open_run(folder)
    if damage in ("newer", "config"):  # a newer mlxgpt may have added the setting
        assert "update mlxgpt" in excinfo.value.remedy


def test_a_changed_number_of_heads_is_refused(runs_dir: Path) -> None:
    """No array shape depends on the number of heads, but the logits do. Older checkpoints without
    model settings are loaded unchecked.
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
    del tree["model"], tree[json_files.CHECKSUM_KEY]
    manifest.write_text(json_files.dump_checksummed(tree))
    loading.load_model(run)


@pytest.mark.parametrize("name", ["日本語", "a\u3000b", "caf\udce9", "हिन्दी"])
def test_data_folders_may_have_unicode_names(runs_dir: Path, name: str) -> None:
    newest = runs.find_run(None, runs_dir)
    run = replace(newest, folder=runs_dir / "another", data_name=name)
    runs.create_run(run)
    assert runs.open_run(run.folder).data_name == name


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\x1b[2Jb", "a\u202eb", "x" * 256])
def test_invalid_data_names_are_refused(runs_dir: Path, name: str) -> None:
    run = replace(runs.find_run(None, runs_dir), folder=runs_dir / "another", data_name=name)
    runs.create_run(run)
    with pytest.raises(UserError, match="damaged"):
        runs.open_run(run.folder)


@pytest.mark.parametrize("number", ERRNOS)
def test_an_unreadable_best_json_is_an_error(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run = runs.open_run(runs_dir / "done")
    failing_open(monkeypatch, "best.json", number)
    for read in (run.best, run.checkpoint_path, lambda: loading.load_model(run)):
        with pytest.raises(OSError, match=r"best\.json"):
            read()
    loading.load_model(run, "newest")


@pytest.mark.parametrize("content", ["garbage", "{}", ""])
def test_a_damaged_best_json_is_recovered_from_the_metrics(runs_dir: Path, content: str) -> None:
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
def test_an_older_checkpoint_is_used_only_if_the_newest_is_damaged(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, notes: list[str]
) -> None:
    run = runs.open_run(runs_dir / "done")
    assert len(run.steps()) > 1
    with monkeypatch.context() as patch:
        if name == "read":  # after the hash was verified

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


def test_errors_of_mlx_are_not_reported_as_damage(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX's errors have no errno; the cause may be a lack of memory."""

    def fail_load(*_: object, **__: object) -> None:
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr(mx, "load", fail_load)
    with pytest.raises(UserError, match="out of memory") as excinfo:
        loading.load_model(runs.open_run(runs_dir / "done"))
    assert not isinstance(excinfo.value, checkpoint.DamagedCheckpointError)


@pytest.mark.parametrize("which", ["best", "newest"])
def test_export_does_not_replace_a_damaged_checkpoint_by_another(
    runs_dir: Path, tmp_path: Path, which: str
) -> None:
    run = runs.open_run(runs_dir / "done")
    weights = run.checkpoint_path(which) / checkpoint.MODEL_FILE
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="missing or damaged") as excinfo:
        api.export(
            to="hf", run="done", runs_dir=runs_dir, checkpoint=which, output=tmp_path / "exported"
        )
    assert "--checkpoint" in excinfo.value.remedy
    assert not (tmp_path / "exported").exists()
    api.generate(run="done", runs_dir=runs_dir, checkpoint=which, max_tokens=1)


@pytest.mark.parametrize("number", ERRNOS)
@pytest.mark.parametrize("name", ["run.json", "best.json", "stat"])
def test_an_unreadable_run_is_reported_when_listing_runs(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str], name: str, number: int
) -> None:
    """The other runs are listed, and none of them is taken for the newest one."""
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
def test_a_folder_that_may_contain_checkpoints_is_not_replaced(
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
def test_run_names_that_are_not_utf8(runs_dir: Path) -> None:
    """MLX reads and writes Python file objects, so it never gets the name."""
    folder = runs_dir / "caf\udce9"
    (runs_dir / "done").rename(folder)
    run = runs.open_run(folder)
    _, saved = loading.load_model(run)
    run.save(run.checkpoints, 99, saved.parameters, {})
    assert run.steps()[-1] == 99
    api.export(to="hf", run=str(folder), output=folder / "hf\udce9")
    assert (folder / "hf\udce9" / "model.safetensors").exists()


def test_missing_or_unreadable_chat_template(runs_dir: Path) -> None:
    run = runs.open_run(runs_dir / "done")
    assert not run.has_chat_template
    with pytest.raises(UserError, match="no chat template"):
        run.chat_template()
    (run.folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot read"):
        run.chat_template()
    (run.folder / "chat_template.jinja").write_text("{{ 1 }}")
    assert run.chat_template() == "{{ 1 }}"
