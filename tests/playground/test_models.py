from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mlxgpt.playground import models
from mlxgpt.playground.models import Models
from mlxgpt.utils.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, trained: Path) -> Path:
    shutil.copytree(trained / "runs" / "done", tmp_path / "mine")
    return tmp_path / "mine"


def test_a_model_is_read_once(folder: Path) -> None:
    there = Models(folder)
    assert there.at() is there.at() is there.at(there.at().step)
    assert there.at(0) is not there.at()
    assert (there.at(0).step, there.at(8).step) == (0, 8)


def test_a_run_is_opened_once_and_anew_where_it_was_written_anew(folder: Path) -> None:
    there = Models(folder)
    run = there.opened()
    assert there.opened() is run
    os.utime(folder / "config.toml", ns=(1, 1))
    assert there.opened() is not run
    shutil.rmtree(folder / "checkpoints" / "step-0000012")
    assert 12 not in there.opened().ages(), "what is there is looked up each time"
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError):
        there.opened()


def test_those_not_used_for_longest_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "KEPT", 2)
    there = Models(folder)
    first, second = there.at(0), there.at(8)
    assert there.at(0) is first
    there.at(12)
    assert there.at(0) is first
    assert there.at(8) is not second


def test_one_alone_may_be_larger_than_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MOST_KEPT", 10)
    there = Models(folder)
    assert there.at(0) is there.at(0)
    first = there.at(0)
    there.at(8)
    assert there.at(0) is not first


def test_a_run_that_was_trained_anew_is_read_anew(folder: Path) -> None:
    there = Models(folder)
    before = there.at(12)
    os.utime(folder / "checkpoints" / "step-0000012", ns=(1, 1))
    assert there.at(12) is not before
    assert there.at(12) is there.at()


def test_of_a_run_that_is_gone(folder: Path) -> None:
    there = Models(folder)
    model = there.at()
    shutil.rmtree(folder)
    assert there.at() is there.at(12) is model
    for step in (0, 8):
        with pytest.raises(UserError, match="is gone"):
            there.at(step)
    with pytest.raises(UserError, match="is gone"):
        Models(folder).at()


def test_a_look_is_taken_once(folder: Path) -> None:
    there = Models(folder)
    model, ids = there.at(), [1, 2, 3]
    look = there.look(model, ids, frozenset())
    assert there.look(model, [1, 2, 3], frozenset()) is look
    assert there.look(model, ids, frozenset({(0, 0)})) is not look
    assert there.look(there.at(8), ids, frozenset()) is not look
