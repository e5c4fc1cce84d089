"""Preparing where each operation of the disk fails once."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from mlxgpt.data.tokenizers.base import END_OF_TEXT
from mlxgpt.utils.errors import UserError
from tests.helpers.faulty_disk import READING, FaultyDisk
from tests.helpers.preparation import Recorder, contents, prepared


def test_every_operation_fails_once_and_nothing_is_lost(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and the last occurrence of each operation on each file."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and no power fails here
    few = many.read_text(encoding="utf-8").split(END_OF_TEXT)[:20]
    many.write_text(END_OF_TEXT.join(few), encoding="utf-8")
    whole, disk = Recorder(), FaultyDisk(tmp_path / "data")
    with disk.plugged_in():
        expected = prepared(many, tmp_path / "data", "char", whole)
    assert whole.chunks > 6
    shutil.rmtree(tmp_path / "data")
    prepared_here = disk.sites.index(("listdir", str(tmp_path / "data" / "x")))
    sites = disk.sites[:prepared_here]  # what follows is read by the test
    first = {site: n for n, site in reversed([*enumerate(sites)])}
    last = {site: n for n, site in enumerate(sites)}
    operations = {name for name, _ in disk.sites}
    assert {
        "write",
        "read",
        "open",
        "fsync",
        "rename",
        "replace",
        "stat",
        "mkdir",
        "close",
    } <= operations
    reading = {n for n, (name, _) in enumerate(disk.sites) if name in READING}
    for n in {*first.values(), *last.values()}:
        disk.number = errno.EIO if n in reading else errno.ENOSPC
        saves = [site for site in sites[:n] if site[0] == "replace" and "progress" in site[1]]
        assert fails_once(n, disk, many, expected) <= whole.chunks - 3 * len(saves), sites[n]
        shutil.rmtree(tmp_path / "data")


def fails_once(n: int, disk: FaultyDisk, source: Path, expected: dict[str, bytes]) -> int:
    """Chunks that were encoded when the same command was given again."""
    data, again = Path(disk.folder), Recorder()
    try:
        with disk.plugged_in(fail_at=n):
            assert prepared(source, data, "char", Recorder()) == expected
    except (OSError, UserError) as error:  # of the lock it is a UserError
        cause = error if isinstance(error, OSError) else error.__cause__
        assert isinstance(cause, OSError), disk.failed
        assert disk.failed
        name = Path(disk.failed[1]).name.removeprefix(".").removesuffix(".new")
        assert (cause.errno, name in cause.filename) == (disk.number, True), disk.failed
    assert prepared(source, data, "char", again) == expected, disk.failed
    assert {path.name for path in data.iterdir()} <= {"x", ".x.lock"}, disk.failed
    return again.chunks


def test_progress_that_cannot_be_read_stays(tmp_path: Path, many: Path) -> None:
    expected = prepared(many, tmp_path / "whole", "char", Recorder())
    data = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        prepared(many, data, "char", Recorder(7))
    before = contents(data / ".x.new")
    disk = FaultyDisk(data, errno.EIO)
    with disk.plugged_in(), pytest.raises(KeyboardInterrupt):
        prepared(many, data, "char", Recorder(0))
    reading = [n for n, (name, _) in enumerate(disk.sites) if name in ("open", "read", "stat")]
    assert any(Path(disk.sites[n][1]).name == "unfinished.json" for n in reading)
    for n in reading:
        with (
            disk.plugged_in(fail_at=n),
            pytest.raises((OSError, UserError, KeyboardInterrupt)),
        ):
            prepared(many, data, "char", Recorder(0))
        assert disk.failed
        after = contents(data / ".x.new")
        for name in ("unfinished.json", "progress.json", "tokenizer.json"):
            assert after[name] == before[name], disk.failed
    again = Recorder()
    assert prepared(many, data, "char", again) == expected
    assert "continuing after 0 MB" in again.lines
