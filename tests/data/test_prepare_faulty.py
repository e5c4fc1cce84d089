"""Dataset preparation while each disk operation fails once."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from mlxgpt.data.tokenizers.base import END_OF_TEXT
from mlxgpt.utils.errors import UserError
from tests.helpers.faulty_disk import READ_OPERATIONS, FaultyDisk
from tests.helpers.preparation import PrepareRecorder, prepare_and_read, read_folder_files


def test_no_data_is_lost_when_any_operation_fails_once(
    tmp_path: Path, documents_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and the last occurrence of each operation on each file fails."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow; no power cuts here
    documents = documents_file.read_text(encoding="utf-8").split(END_OF_TEXT)[:20]
    documents_file.write_text(END_OF_TEXT.join(documents), encoding="utf-8")
    uninterrupted, disk = PrepareRecorder(), FaultyDisk(tmp_path / "data")
    with disk.watching():
        expected = prepare_and_read(documents_file, tmp_path / "data", "char", uninterrupted)
    assert uninterrupted.chunks > 6
    shutil.rmtree(tmp_path / "data")
    lists = [(name, str(tmp_path / "data" / "x")) for name in ("listdir", "scandir")]
    preparation_end = next(n for n, site in enumerate(disk.operations) if site in lists)
    sites = disk.operations[:preparation_end]  # later operations belong to the test
    first = {site: n for n, site in reversed([*enumerate(sites)])}
    last = {site: n for n, site in enumerate(sites)}
    operations = {name for name, _ in disk.operations}
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
    read_indices = {n for n, (name, _) in enumerate(disk.operations) if name in READ_OPERATIONS}
    for n in {*first.values(), *last.values()}:
        disk.errno_code = errno.EIO if n in read_indices else errno.ENOSPC
        saves = [site for site in sites[:n] if site[0] == "replace" and "progress" in site[1]]
        assert prepare_with_failure(
            n, disk, documents_file, expected
        ) <= uninterrupted.chunks - 3 * len(saves), sites[n]
        shutil.rmtree(tmp_path / "data")


def prepare_with_failure(
    index: int, disk: FaultyDisk, source: Path, expected: dict[str, bytes]
) -> int:
    """Prepare with a failing operation, then again; return the chunks encoded the second time."""
    data, resumed = Path(disk.folder), PrepareRecorder()
    try:
        with disk.watching(fail_at=index):
            assert prepare_and_read(source, data, "char", PrepareRecorder()) == expected
    except (OSError, UserError) as error:  # failures of the lock raise a UserError
        cause = error if isinstance(error, OSError) else error.__cause__
        assert isinstance(cause, OSError), disk.failed_operation
        assert disk.failed_operation
        name = Path(disk.failed_operation[1]).name.removeprefix(".").removesuffix(".new")
        assert (cause.errno, name in cause.filename) == (disk.errno_code, True), (
            disk.failed_operation
        )
    assert prepare_and_read(source, data, "char", resumed) == expected, disk.failed_operation
    assert {path.name for path in data.iterdir()} <= {"x", ".x.lock"}, disk.failed_operation
    return resumed.chunks


def test_unreadable_progress_is_kept(tmp_path: Path, documents_file: Path) -> None:
    expected = prepare_and_read(documents_file, tmp_path / "whole", "char", PrepareRecorder())
    data = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        prepare_and_read(documents_file, data, "char", PrepareRecorder(7))
    before = read_folder_files(data / ".x.new")
    disk = FaultyDisk(data, errno.EIO)
    with disk.watching(), pytest.raises(KeyboardInterrupt):
        prepare_and_read(documents_file, data, "char", PrepareRecorder(0))
    read_indices = [
        n for n, (name, _) in enumerate(disk.operations) if name in ("open", "read", "stat")
    ]
    assert any(Path(disk.operations[n][1]).name == "unfinished.json" for n in read_indices)
    for n in read_indices:
        with (
            disk.watching(fail_at=n),
            pytest.raises((OSError, UserError, KeyboardInterrupt)),
        ):
            prepare_and_read(documents_file, data, "char", PrepareRecorder(0))
        assert disk.failed_operation
        after = read_folder_files(data / ".x.new")
        for name in ("unfinished.json", "progress.json", "tokenizer.json"):
            assert after[name] == before[name], disk.failed_operation
    resumed = PrepareRecorder()
    assert prepare_and_read(documents_file, data, "char", resumed) == expected
    assert "resuming after 0 MB" in resumed.lines
