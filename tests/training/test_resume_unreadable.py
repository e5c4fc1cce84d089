"""Trainings whose files cannot be read or written for a moment, and lose nothing."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.training import validation
from mlxgpt.utils.errors import UserError
from tests.helpers.failing_files import NUMBERS, error, failing_open
from tests.helpers.training_runs import final_state, metrics

pytestmark = pytest.mark.usefixtures("no_check")
FOLDER = Path("runs/a")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_as_uninterrupted(train: Any, *missing: int) -> None:
    """The same command once more ends with the same bits and notes as one that nothing stopped,
    but for the metrics of the steps that are missing.
    """
    train("a", max_steps=24, decay_steps=24)
    train("b", max_steps=24, decay_steps=24)
    for name, value in final_state("b").items():
        assert (final_state("a")[name] == value).all(), name
    assert metrics("a") == [line for line in metrics("b") if line["step"] not in missing]
    a, b = (Path("runs") / name / "samples.txt" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert runs.open_run(FOLDER).best() == runs.open_run(Path("runs/b")).best()


@pytest.mark.parametrize(
    ("name", "after", "number"),
    [
        ("metrics.jsonl", 0, errno.EIO),
        ("metrics.jsonl", 1, errno.EMFILE),
        ("samples.txt", 0, errno.EACCES),
        ("samples.txt", 1, errno.EIO),
        ("best.json", 0, errno.EMFILE),
        ("history.jsonl", 1, errno.EIO),
    ],
)
@pytest.mark.exact_bits
def test_no_failed_open_loses_what_was_noted(
    train: Any, monkeypatch: pytest.MonkeyPatch, name: str, number: int, after: int
) -> None:
    train("a", max_steps=12, decay_steps=24)
    before = {path: content for path, content in contents(FOLDER).items() if path.name == name}
    with monkeypatch.context() as patch:
        failed = failing_open(patch, name, number, after=after)
        with pytest.raises((OSError, UserError)) as caught:
            train("a", max_steps=24, decay_steps=24)
    assert failed
    assert name in str(caught.value)
    for path, content in before.items():
        if name != "best.json":
            assert path.read_bytes().startswith(content)
    same_as_uninterrupted(train)


@pytest.mark.parametrize("number", [errno.EACCES])
def test_the_best_is_kept_while_it_cannot_be_read(
    train: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    losses = itertools.count(1.0)

    def evaluator() -> SimpleNamespace:
        return SimpleNamespace(loss=next(losses), bits_per_byte=1.0, tokens=9)

    monkeypatch.setattr(validation, "Evaluator", lambda *_, **__: evaluator)
    train("a", max_steps=12, decay_steps=24, keep_checkpoints=1)
    best = {"step": 4, "val_loss": 1.0}
    assert runs.open_run(FOLDER).best() == best
    with monkeypatch.context() as patch:
        failing_open(patch, "best.json", number)
        with pytest.raises((OSError, UserError), match=os.strerror(number)):
            train("a", max_steps=24, decay_steps=24, keep_checkpoints=1)
    run = runs.open_run(FOLDER)
    assert run.best() == best
    assert 4 in run.steps()
    (FOLDER / "best.json").write_text("damaged")
    train("a", max_steps=24, decay_steps=24, keep_checkpoints=1)
    assert run.best() == best
    assert run.steps() == [4, 24]


@pytest.mark.parametrize(
    ("name", "step", "saved", "number", "missing"),
    [
        ("log", 10, 11, errno.EIO, ()),  # the next step was handed over; written later
        ("log", 10, 11, errno.ENOSPC, (10,)),
        ("log", 8, 8, errno.EIO, ()),
        ("add_sample", 8, 8, errno.EIO, ()),
        ("set_best", 8, 8, errno.ENOSPC, ()),
    ],
)
@pytest.mark.exact_bits
def test_notes_that_cannot_be_written_end_the_training_saved(
    train: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    step: int,
    saved: int,
    number: int,
    missing: tuple[int, ...],
) -> None:
    """Also between two checkpoints. Half a line was written. What fails once is tried again."""
    failed: list[int] = []
    monkeypatch.setattr(runs.Run, "best", lambda run: None)  # each evaluation is the best
    real = getattr(runs.Run, name)

    def failing(run: runs.Run, what: Any, *given: Any) -> None:
        if (what["step"] if name == "log" else what) == step and (missing or not failed):
            failed.append(step)
            with (FOLDER / "metrics.jsonl").open("a") as file:
                file.write('{"step": 9, "lo')
            raise error(number, FOLDER / "metrics.jsonl")
        real(run, what, *given)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, name, failing)
        with pytest.raises(UserError) as caught:
            train("a", max_steps=24, decay_steps=24)
    reason = os.strerror(number)
    assert caught.value.problem == (
        f"cannot read or write runs/a/metrics.jsonl: {reason}; stopped and saved at step {saved}"
    )
    assert "run the same command again" in caught.value.remedy
    assert runs.open_run(FOLDER).steps()[-1] == saved
    same_as_uninterrupted(train, *missing)


@pytest.mark.exact_bits
def test_a_line_that_is_written_in_spite_of_an_error_is_there_once(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where closing the file fails."""
    failed: list[int] = []
    real = runs.Run.log

    def late(run: runs.Run, record: Any) -> None:
        real(run, record)
        if record["step"] == 10 and not failed:
            failed.append(10)
            raise error(errno.EIO, FOLDER / "metrics.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", late)
        with pytest.raises(UserError, match="saved at step 11"):
            train("a", max_steps=24, decay_steps=24)
    steps = [record["step"] for record in runs.open_run(FOLDER).metrics()]
    assert steps == sorted(set(steps))
    same_as_uninterrupted(train)


def answering_no(real: Callable[[Path], bool]) -> Callable[[Path], bool]:
    def answer(path: Path) -> bool:
        try:
            return real(path)
        except OSError:
            return False

    return answer


@pytest.mark.parametrize(
    ("name", "after", "number"),
    [
        ("checkpoints", 0, errno.EIO),
        ("checkpoints", 1, errno.EACCES),
        ("run.json", 0, errno.EMFILE),
        ("step-0000012", 0, errno.EIO),
    ],
)
@pytest.mark.exact_bits
def test_no_failed_stat_begins_a_run_again(
    train: Any, monkeypatch: pytest.MonkeyPatch, name: str, number: int, after: int
) -> None:
    """Where Path's own predicates answer as from Python 3.14 on."""
    train("a", max_steps=12, decay_steps=24)
    before = contents(FOLDER / "checkpoints")
    real, calls = os.stat, []

    def failing(path: Any, *given: Any, **named: Any) -> os.stat_result:
        if isinstance(path, Path) and path.name == name and FOLDER in (path, *path.parents):
            calls.append(path)
            if len(calls) == after + 1:
                raise error(number, path)
        return real(path, *given, **named)

    with monkeypatch.context() as patch:
        for predicate in ("exists", "is_file", "is_dir"):
            patch.setattr(Path, predicate, answering_no(getattr(Path, predicate)))
        patch.setattr(os, "stat", failing)
        with pytest.raises((OSError, UserError), match=name):
            train("a", max_steps=24, decay_steps=24)
    assert len(calls) > after
    assert contents(FOLDER / "checkpoints") == before
    same_as_uninterrupted(train)


@pytest.mark.parametrize(
    ("name", "number"),
    list(
        zip(
            (checkpoint.MANIFEST_FILE, checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE),
            NUMBERS,
            strict=True,
        )
    ),
)
def test_resuming_never_passes_over_a_checkpoint_that_cannot_be_read(
    train: Any, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    train("a", max_steps=12, decay_steps=24)
    before = contents(FOLDER)
    with monkeypatch.context() as patch:
        failing_open(patch, name, number)
        with pytest.raises(OSError, match=name):
            train("a", max_steps=24, decay_steps=24)
    assert contents(FOLDER) == before
