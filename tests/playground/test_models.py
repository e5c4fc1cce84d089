from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mlxgpt.playground import models
from mlxgpt.playground.models import ModelCache
from mlxgpt.storage import run as runs
from mlxgpt.storage.checkpoint import MODEL_FILE
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, trained: Path) -> Path:
    shutil.copytree(trained / "runs" / "done", tmp_path / "mine")
    return tmp_path / "mine"


def test_models_are_cached(folder: Path) -> None:
    cache = ModelCache(folder)
    assert cache.get_model() is cache.get_model() is cache.get_model(cache.get_model().step)
    assert cache.get_model(0) is not cache.get_model()
    assert (cache.get_model(0).step, cache.get_model(8).step) == (0, 8)


def test_run_is_reopened_when_its_files_change(folder: Path) -> None:
    cache = ModelCache(folder)
    run = cache.get_run()
    assert cache.get_run() is run
    os.utime(folder / "config.toml", ns=(1, 1))
    assert cache.get_run() is not run
    shutil.rmtree(folder / "checkpoints" / "step-0000012")
    assert 12 not in cache.get_run().saved_steps(), "checkpoints are listed each time"
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError):
        cache.get_run()


def test_least_recently_used_model_is_evicted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "MAX_CACHED", 2)
    cache = ModelCache(folder)
    first, second = cache.get_model(0), cache.get_model(8)
    assert cache.get_model(0) is first
    cache.get_model(12)
    assert cache.get_model(0) is first
    assert cache.get_model(8) is not second


def test_model_larger_than_the_limit_is_cached_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "MAX_CACHED_PARAMETERS", 10)
    cache = ModelCache(folder)
    assert cache.get_model(0) is cache.get_model(0)
    first = cache.get_model(0)
    cache.get_model(8)
    assert cache.get_model(0) is not first


def test_model_is_reloaded_when_its_checkpoint_changes(folder: Path) -> None:
    cache = ModelCache(folder)
    model = cache.get_model(12)
    os.utime(folder / "checkpoints" / "step-0000012", ns=(1, 1))
    assert cache.get_model(12) is not model
    assert cache.get_model(12) is cache.get_model()


def test_deleted_run_only_has_cached_models(folder: Path) -> None:
    cache = ModelCache(folder)
    model = cache.get_model()
    shutil.rmtree(folder)
    assert cache.get_model() is cache.get_model(12) is model
    for step in (0, 8):
        with pytest.raises(UserError, match="no longer exists"):
            cache.get_model(step)
    with pytest.raises(UserError, match="no longer exists"):
        ModelCache(folder).get_model()


def test_traces_are_cached(folder: Path) -> None:
    cache = ModelCache(folder)
    model, ids = cache.get_model(), [1, 2, 3]
    trace = cache.get_trace(model, ids, frozenset())
    assert cache.get_trace(model, [1, 2, 3], frozenset()) is trace
    assert cache.get_trace(model, ids, frozenset({(0, 0)})) is not trace
    assert cache.get_trace(cache.get_model(8), ids, frozenset()) is not trace


@pytest.fixture
def tuned(folder: Path) -> Path:
    """A run that was initialized from the last checkpoint of the run in `folder`."""
    parent = runs.open_run(folder)
    sha256 = files.sha256_file(parent.checkpoint_path("12") / MODEL_FILE)
    origin = {"run": parent.name, "step": 12, "sha256": sha256}
    tuned = replace(parent, folder=folder.with_name("tuned"), origin=origin)
    runs.create_run(tuned)
    shutil.copytree(parent.checkpoints, tuned.checkpoints, dirs_exist_ok=True)
    return tuned.folder


def test_a_reference_is_found_without_loading_it(folder: Path, tuned: Path) -> None:
    cache = ModelCache(tuned)
    assert cache.get_reference() is cache.get_reference()
    assert cache.get_reference().run.name == "mine"
    cache = ModelCache(tuned)
    (folder / "checkpoints" / "step-0000012" / MODEL_FILE).write_bytes(b"damaged")
    reference = cache.find_reference()
    assert reference
    assert reference.name == "mine"
    with pytest.raises(UserError, match="mine is no longer the model that tuned was"):
        cache.get_reference()


@pytest.mark.parametrize("missing", ["config.toml", "checkpoints/step-0000012", "run.json"])
def test_a_reference_that_is_not_there_is_none(folder: Path, tuned: Path, missing: str) -> None:
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    cache = ModelCache(tuned)
    assert cache.find_reference() is None
    with pytest.raises(UserError, match="is not in the same folder"):
        cache.get_reference()
    assert cache.get_model().step == 12
