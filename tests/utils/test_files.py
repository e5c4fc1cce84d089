from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxgpt.data import folders
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.json"
    files.write_atomically(path, "old")
    monkeypatch.setattr(files, "fsync_path", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "nothing half-written stays"


def test_a_file_is_synced_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    rename = Path.replace

    def record_rename(path: Path, target: Path) -> Path:
        events.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(files, "fsync_path", lambda path: events.append(path.name))
    monkeypatch.setattr(Path, "replace", record_rename)
    files.write_atomically(tmp_path / "best.json", "new")
    assert events == [".best.json.new", "renamed", tmp_path.name]


def test_remove_folder_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "b").touch()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)  # as if killed here
        files.remove_folder(folder)
    assert not folder.exists()
    folder.mkdir()
    files.remove_folder(folder)
    assert list(tmp_path.iterdir()) == [], "what was left is swept up by the next one"


def test_a_lock_file_deleted_while_waiting_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner may delete it after we opened it; other processes would then lock a new file."""
    original, calls = fcntl.flock, []

    def flock_after_unlink(file: object, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / ".run.lock").unlink()
        original(file, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", flock_after_unlink)
    with files.file_lock(tmp_path / "run", "training"):
        assert len(calls) == 2
        assert (tmp_path / ".run.lock").exists()
        second_lock = files.file_lock(tmp_path / "run", "training")
        with pytest.raises(UserError, match="another process is already training"), second_lock:
            pass
    assert not (tmp_path / ".run.lock").exists()


def test_a_file_that_disappears_during_the_symlink_check_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when training deletes an old checkpoint while another process generates."""
    (tmp_path / "a").touch()
    original = Path.lstat

    def lstat_after_unlink(path: Path) -> os.stat_result:
        path.unlink()
        return original(path)

    monkeypatch.setattr(Path, "lstat", lstat_after_unlink)
    files.reject_symlinks(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("refused", "expected"), [(False, [51]), (True, [51, -1])])
def test_fsync_on_macos_uses_f_fullfsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool, expected: list[int]
) -> None:
    """On macOS, fsync leaves data in the drive's cache. Network volumes may lack F_FULLFSYNC."""
    sync_calls: list[int] = []

    def fcntl(descriptor: int, command: int) -> None:
        sync_calls.append(command)
        if refused:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(files, "fcntl", SimpleNamespace(F_FULLFSYNC=51, fcntl=fcntl))
    monkeypatch.setattr(os, "fsync", lambda descriptor: sync_calls.append(-1))
    files.fsync_path(tmp_path)
    assert sync_calls == expected


def test_names_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "a.json", json.dumps(["caf\udce9"], ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == ["caf\udce9"]


PREDICATES = [files.exists, files.is_file, files.is_folder, files.lexists]


@pytest.mark.parametrize("predicate", PREDICATES)
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENAMETOOLONG])
def test_predicates_raise_if_the_answer_is_unknown(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    predicate: Callable[[Path], bool],
    number: int,
) -> None:
    def fail_stat(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "stat", fail_stat)
    with pytest.raises(OSError, match=os.strerror(number)) as excinfo:
        predicate(tmp_path)
    assert excinfo.value.errno == number
    assert excinfo.value.filename == str(tmp_path)


@pytest.mark.parametrize("predicate", PREDICATES)
def test_predicates_are_false_for_missing_paths(
    tmp_path: Path, predicate: Callable[[Path], bool]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert not predicate(tmp_path / "nothing")
    assert not predicate(tmp_path / "file" / "below")
    assert not predicate(tmp_path / "loop" / "below")
    assert not predicate(Path("a\0b"))


def test_predicates_of_files_folders_and_links(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder", "nothing"):
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
    results = {
        path.name: [predicate(path) for predicate in PREDICATES] for path in tmp_path.iterdir()
    }
    assert results == {
        "file": [True, True, False, True],
        "folder": [True, False, True, True],
        "to-file": [True, True, False, True],
        "to-folder": [True, False, True, True],
        "to-nothing": [False, False, False, True],
    }


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_an_unreadable_folder_is_not_treated_as_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "a.txt").touch()
    assert files.list_matching(tmp_path, "*.txt") == [tmp_path / "a.txt"]
    assert files.list_matching(tmp_path / "nothing", "*") == []
    assert files.list_matching(tmp_path / "a.txt", "*") == []

    def fail_listing(path: Path, *_: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "listdir", fail_listing)
    monkeypatch.setattr(os, "scandir", fail_listing)
    for read in (
        lambda: files.list_matching(tmp_path, "*"),
        lambda: folders.expand_pattern(tmp_path / "*.txt"),
        lambda: folders.expand_pattern(tmp_path / "**" / "a.txt"),
        lambda: files.reject_symlinks(tmp_path),
    ):
        with pytest.raises(OSError, match=os.strerror(number)):
            read()


def test_is_same_file_compares_inodes(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    assert files.is_same_file(descriptor, folder)
    folder.rename(tmp_path / "b")
    assert not files.is_same_file(descriptor, folder)
    assert files.is_same_file(descriptor, tmp_path / "b")
    (tmp_path / "b").rmdir()
    folder.mkdir()
    assert not files.is_same_file(descriptor, folder)
    (tmp_path / "b").touch()
    assert not files.is_same_file(descriptor, tmp_path / "b" / "below")
    os.close(descriptor)


def test_errors_when_closing_unwritten_files_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = os.close

    def close_with_error(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", close_with_error)
    files.fsync_path(tmp_path)
    for _ in range(2):
        with files.file_lock(tmp_path / "run", "training"):
            pass


def test_remove_folder_clears_leftovers_of_an_interrupted_removal(tmp_path: Path) -> None:
    (tmp_path / f".run{files.TRASH_SUFFIX}" / "checkpoints").mkdir(parents=True)
    files.remove_folder(tmp_path / "run")  # no longer exists
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_only_folders_may_lack_support_for_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(files.sys, "platform", "linux")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        files.fsync_path(tmp_path / "file")
    if number == errno.EIO:
        with pytest.raises(OSError, match="error"):
            files.fsync_path(tmp_path)
    else:
        files.fsync_path(tmp_path)
