from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt import files
from mlxgpt.errors import UserError


def test_a_text_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.json"
    files.write_atomically(path, "old")
    monkeypatch.setattr(files, "sync", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "nothing half-written stays"


def test_the_disk_holds_a_text_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    rename = Path.replace

    def renamed(path: Path, target: Path) -> Path:
        done.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(files, "sync", lambda path: done.append(path.name))
    monkeypatch.setattr(Path, "replace", renamed)
    files.write_atomically(tmp_path / "best.json", "new")
    assert done == [".best.json.new", "renamed", tmp_path.name]


def test_a_folder_goes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "b").touch()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)  # killed here
        files.remove(folder)
    assert not folder.exists()
    folder.mkdir()
    files.remove(folder)
    assert list(tmp_path.iterdir()) == [], "what was left is swept up by the next one"


def test_a_lock_that_was_taken_away_while_we_waited_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner may delete it between our opening and locking: others would lock another file."""
    real, calls = fcntl.flock, []

    def late(file: object, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / ".run.lock").unlink()
        real(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    with files.only_one(tmp_path / "run", "training"):
        assert len(calls) == 2
        assert (tmp_path / ".run.lock").exists()
        refused = files.only_one(tmp_path / "run", "training")
        with pytest.raises(UserError, match="another process is training"), refused:
            pass
    assert not (tmp_path / ".run.lock").exists()


def test_what_disappears_while_it_is_looked_at_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a training deletes an old checkpoint while somebody generates."""
    (tmp_path / "a").touch()
    real = Path.lstat

    def late(path: Path) -> os.stat_result:
        path.unlink()
        return real(path)

    monkeypatch.setattr(Path, "lstat", late)
    files.only_plain(tmp_path)
    assert list(tmp_path.iterdir()) == []


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(tree=st.dictionaries(st.text().filter(lambda k: k not in ("seal", "format")), values))
def test_what_was_sealed_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, tree: dict
) -> None:
    path = tmp_path_factory.mktemp("sealed") / "x.json"
    path.write_text(files.sealed(tree), encoding="utf-8")
    assert files.read_sealed(path, 1) == tree


def test_no_bit_of_a_sealed_file_changes_unnoticed(tmp_path: Path) -> None:
    tree = {"format": 1, "step": 12, "loss": 1.25, "name": "tier1", "parts": {"a": [1, 2]}}
    path = tmp_path / "x.json"
    whole = files.sealed(tree).encode()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert files.read_sealed(path, 1) == tree, "such as another kind of white space"
        except (ValueError, UserError):
            continue


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"step": 1}', '{"step": 1, "seal": "x"}'])
def test_what_has_no_seal_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"\w"):
        files.read_sealed(tmp_path / "x.json", 1)


def test_a_newer_format_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"format": 2, "whatever": 1}))
    with pytest.raises(UserError, match=r"newer mlxgpt \(format 2\)"):
        files.read_sealed(tmp_path / "x.json", 1)


@pytest.mark.parametrize(("refused", "expected"), [(False, [51]), (True, [51, -1])])
def test_a_mac_is_asked_for_a_full_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool, expected: list[int]
) -> None:
    """On macOS, fsync leaves data in the drive's cache; F_FULLFSYNC does not. A server's volume
    knows only the former.
    """
    asked: list[int] = []

    def fcntl(descriptor: int, what: int) -> None:
        asked.append(what)
        if refused:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(files, "fcntl", SimpleNamespace(F_FULLFSYNC=51, fcntl=fcntl))
    monkeypatch.setattr(os, "fsync", lambda descriptor: asked.append(-1))
    files.sync(tmp_path)
    assert asked == expected


def test_a_name_that_is_not_utf8_is_written_as_an_escape(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "a.json", json.dumps(["caf\udce9"], ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == ["caf\udce9"]


def test_a_path_that_is_not_utf8_is_refused() -> None:
    files.must_be_utf8(Path("runs/日本"), "")
    with pytest.raises(UserError, match=r"caf\\udce9' has bytes that are not UTF-8"):
        files.must_be_utf8(Path("runs/caf\udce9"), "choose another --run.")
