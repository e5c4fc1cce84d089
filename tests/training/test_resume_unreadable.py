"""Runs lose nothing when files temporarily cannot be read or written."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxgpt.evaluation.loss import Evaluation
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.training import validation
from mlxgpt.utils.errors import UserError
from tests.helpers.failing_files import ERRNOS, failing_open, make_os_error
from tests.helpers.training_runs import final_state, metrics

pytestmark = pytest.mark.usefixtures("no_check")
RUN_FOLDER = Path("runs/a")


def read_tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_as_uninterrupted(train: Any, *missing_steps: int) -> None:
    """Check that resuming gives the same weights and logs as an uninterrupted run, except for the
    metrics of `missing_steps`.
    """
    train("a", max_steps=24, decay_steps=24)
    train("b", max_steps=24, decay_steps=24)
    for name, value in final_state("b").items():
        assert (final_state("a")[name] == value).all(), name
    assert metrics("a") == [line for line in metrics("b") if line["step"] not in missing_steps]
    a, b = (Path("runs") / name / "samples.txt" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert runs.open_run(RUN_FOLDER).best() == runs.open_run(Path("runs/b")).best()


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
def test_a_failed_open_loses_no_logs(
    train: Any, monkeypatch: pytest.MonkeyPatch, name: str, number: int, after: int
) -> None:
    train("a", max_steps=12, decay_steps=24)
    before = {path: content for path, content in read_tree(RUN_FOLDER).items() if path.name == name}
    with monkeypatch.context() as patch:
        failed_paths = failing_open(patch, name, number, after=after)
        with pytest.raises((OSError, UserError)) as excinfo:
            train("a", max_steps=24, decay_steps=24)
    assert failed_paths
    assert name in str(excinfo.value)
    for path, content in before.items():
        if name != "best.json":
            assert path.read_bytes().startswith(content)
    assert_same_as_uninterrupted(train)


@pytest.mark.parametrize("number", [errno.EACCES])
def test_the_best_checkpoint_is_kept_while_best_json_is_unreadable(
    train: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    losses = itertools.count(1.0)

    def validate(self: Any, step: int) -> tuple[Evaluation, Evaluation, None]:
        result = Evaluation(next(losses), bits_per_byte=1.0, perplexity=1.0, tokens=9)
        return result, result, None

    monkeypatch.setattr(validation.Validation, "__call__", validate)
    train("a", max_steps=12, decay_steps=24, keep_checkpoints=1)
    best = {"step": 4, "val_loss": 1.0}
    assert runs.open_run(RUN_FOLDER).best() == best
    with monkeypatch.context() as patch:
        failing_open(patch, "best.json", number)
        with pytest.raises((OSError, UserError), match=os.strerror(number)):
            train("a", max_steps=24, decay_steps=24, keep_checkpoints=1)
    run = runs.open_run(RUN_FOLDER)
    assert run.best() == best
    assert 4 in run.steps()
    (RUN_FOLDER / "best.json").write_text("damaged")
    train("a", max_steps=24, decay_steps=24, keep_checkpoints=1)
    assert run.best() == best
    assert run.steps() == [4, 24]


@pytest.mark.parametrize(
    ("name", "step", "saved", "number", "missing"),
    [
        ("log", 10, 11, errno.EIO, ()),  # the next step was already submitted; logged later
        ("log", 10, 11, errno.ENOSPC, (10,)),
        ("log", 8, 8, errno.EIO, ()),
        ("add_sample", 8, 8, errno.EIO, ()),
        ("set_best", 8, 8, errno.ENOSPC, ()),
    ],
)
@pytest.mark.exact_bits
def test_unwritable_logs_save_and_end_training(
    train: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    step: int,
    saved: int,
    number: int,
    missing: tuple[int, ...],
) -> None:
    """Also between two checkpoints and after a partial line; failed writes are retried once."""
    failed_steps: list[int] = []
    monkeypatch.setattr(runs.Run, "best", lambda run: None)  # each evaluation is the best
    original = getattr(runs.Run, name)

    def write_or_fail(run: runs.Run, entry: Any, *args: Any) -> None:
        if (entry["step"] if name == "log" else entry) == step and (missing or not failed_steps):
            failed_steps.append(step)
            with (RUN_FOLDER / "metrics.jsonl").open("a") as file:
                file.write('{"step": 9, "lo')
            raise make_os_error(number, RUN_FOLDER / "metrics.jsonl")
        original(run, entry, *args)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, name, write_or_fail)
        with pytest.raises(UserError) as excinfo:
            train("a", max_steps=24, decay_steps=24)
    reason = os.strerror(number)
    assert excinfo.value.problem == (
        f"cannot read or write runs/a/metrics.jsonl: {reason}; saved step {saved} and stopped"
    )
    assert "run the same command again" in excinfo.value.remedy
    assert runs.open_run(RUN_FOLDER).steps()[-1] == saved
    assert_same_as_uninterrupted(train, *missing)


@pytest.mark.exact_bits
def test_a_line_written_despite_an_error_is_not_repeated(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when closing the file fails."""
    failed_steps: list[int] = []
    original = runs.Run.log

    def write_then_fail(run: runs.Run, record: Any) -> None:
        original(run, record)
        if record["step"] == 10 and not failed_steps:
            failed_steps.append(10)
            raise make_os_error(errno.EIO, RUN_FOLDER / "metrics.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", write_then_fail)
        with pytest.raises(UserError, match="saved step 11"):
            train("a", max_steps=24, decay_steps=24)
    steps = [record["step"] for record in runs.open_run(RUN_FOLDER).metrics()]
    assert steps == sorted(set(steps))
    assert_same_as_uninterrupted(train)


def false_on_error(predicate: Callable[[Path], bool]) -> Callable[[Path], bool]:
    def answer(path: Path) -> bool:
        try:
            return predicate(path)
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
def test_a_failed_stat_does_not_restart_a_run(
    train: Any, monkeypatch: pytest.MonkeyPatch, name: str, number: int, after: int
) -> None:
    """With Path's predicates returning False on errors, as from Python 3.14 on."""
    train("a", max_steps=12, decay_steps=24)
    before = read_tree(RUN_FOLDER / "checkpoints")
    original, calls = os.stat, []

    def stat_or_fail(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if isinstance(path, Path) and path.name == name and RUN_FOLDER in (path, *path.parents):
            calls.append(path)
            if len(calls) == after + 1:
                raise make_os_error(number, path)
        return original(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        for predicate in ("exists", "is_file", "is_dir"):
            patch.setattr(Path, predicate, false_on_error(getattr(Path, predicate)))
        patch.setattr(os, "stat", stat_or_fail)
        with pytest.raises((OSError, UserError), match=name):
            train("a", max_steps=24, decay_steps=24)
    assert len(calls) > after
    assert read_tree(RUN_FOLDER / "checkpoints") == before
    assert_same_as_uninterrupted(train)


@pytest.mark.parametrize(
    ("name", "number"),
    list(
        zip(
            (checkpoint.MANIFEST_FILE, checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE),
            ERRNOS,
            strict=True,
        )
    ),
)
def test_resuming_never_skips_an_unreadable_checkpoint(
    train: Any, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    train("a", max_steps=12, decay_steps=24)
    before = read_tree(RUN_FOLDER)
    with monkeypatch.context() as patch:
        failing_open(patch, name, number)
        with pytest.raises(OSError, match=name):
            train("a", max_steps=24, decay_steps=24)
    assert read_tree(RUN_FOLDER) == before
