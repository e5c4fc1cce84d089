"""Files that were hashed once are not read again until they change or verification is requested."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxgpt import api
from mlxgpt.config import DataConfig
from mlxgpt.data import dataset, nanogpt, prepare_job, sources, token_array
from mlxgpt.data.dataset import open_dataset
from mlxgpt.data.hash_cache import HashCache
from mlxgpt.data.prepare import find_or_prepare
from mlxgpt.data.prepare_job import PrepareRequest
from mlxgpt.utils.errors import UserError
from mlxgpt.utils.json_files import dump_checksummed


class ReadLog(list[str]):
    """Names of the files that were read completely."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> ReadLog:
    names = ReadLog()

    def record_scan(path: Path, *args: Any, **options: Any) -> dict[str, object]:
        names.append(path.name)
        return token_array.scan_token_file(path, *args, **options)

    hash_files = sources._hash_files

    def record_hash(paths: list[Path]) -> str:
        names.extend(path.name for path in paths)
        return hash_files(paths)

    for module in (dataset, nanogpt, prepare_job):
        monkeypatch.setattr(module, "scan_token_file", record_scan)
    monkeypatch.setattr(sources, "_hash_files", record_hash)
    return names


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    (tmp_path / "one.txt").write_text("hello<|endoftext|>world")
    (tmp_path / "held.txt").write_text("held")
    return DataConfig((str(tmp_path / "one.txt"),), (str(tmp_path / "held.txt"),))


def test_prepared_files_are_not_read_again(
    tmp_path: Path, data: DataConfig, reads: ReadLog
) -> None:
    first = find_or_prepare(PrepareRequest(data), tmp_path / "data")
    assert reads == ["one.txt", "held.txt", "train.bin", "val.bin"]
    reads.clear()
    assert find_or_prepare(PrepareRequest(data), tmp_path / "data").meta == first.meta
    assert open_dataset(first.folder).meta == first.meta
    assert reads == []


def test_verify_reads_the_files_again(tmp_path: Path, data: DataConfig, reads: ReadLog) -> None:
    folder = find_or_prepare(PrepareRequest(data), tmp_path / "data").folder
    reads.clear()
    find_or_prepare(PrepareRequest(data, verify=True), tmp_path / "data")
    assert reads == ["one.txt", "held.txt", "train.bin", "val.bin"]
    find_or_prepare(PrepareRequest(DataConfig((str(folder),)), verify=True), tmp_path)
    assert reads[4:] == ["train.bin", "val.bin"]


def test_verify_logs_its_result(home: Path, text_file: Path, notes: list[str]) -> None:
    for verify in (False, True):
        api.prepare(text_file, verify=verify)
    assert notes == [
        f"preparing {text_file} in data/words",
        "verified: all checksums match",
    ]


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def rewrite(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))  # same content, size and modification time
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [touch, rewrite])
def test_file_that_may_have_changed_is_read_once_more(
    tmp_path: Path, data: DataConfig, reads: ReadLog, change: Callable[[Path], None]
) -> None:
    folder = find_or_prepare(PrepareRequest(data), tmp_path / "data").folder
    change(folder / "val.bin")
    change(tmp_path / "one.txt")
    reads.clear()
    for _ in range(2):
        find_or_prepare(PrepareRequest(data), tmp_path / "data")
    assert reads == ["one.txt", "val.bin"]


def test_copied_folder_is_read_once(tmp_path: Path, data: DataConfig, reads: ReadLog) -> None:
    folder = find_or_prepare(PrepareRequest(data), tmp_path / "data").folder
    shutil.copytree(folder, tmp_path / "copy")
    reads.clear()
    for _ in range(2):
        open_dataset(tmp_path / "copy")
    assert reads == ["train.bin", "val.bin"]


def test_verify_finds_damage_with_an_unchanged_modification_time(
    tmp_path: Path, data: DataConfig
) -> None:
    """As after disk corruption, which only reading can detect."""
    folder = find_or_prepare(PrepareRequest(data), tmp_path / "data").folder
    path, before = folder / "train.bin", (folder / "train.bin").stat()
    with path.open("r+b") as file:
        file.write(b"\1")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    open_dataset(folder)
    with pytest.raises(UserError, match=r"does not match meta\.json"):
        open_dataset(folder, verify=True)


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "",
        dump_checksummed({"format": 1, "known": 3}),
        dump_checksummed({"format": 1}),
        "gone",
        "a pipe",
    ],
)
def test_damaged_hash_cache_is_ignored(
    tmp_path: Path, data: DataConfig, reads: ReadLog, damage: str
) -> None:
    folder = find_or_prepare(PrepareRequest(data), tmp_path / "data").folder
    path = folder / "verified.json"
    path.unlink()
    if damage == "a pipe":
        os.mkfifo(path)
    elif damage != "gone":
        path.write_text(damage)
    reads.clear()
    if damage == "a pipe":
        with pytest.raises(UserError, match="is a symbolic link or not a regular file"):
            open_dataset(folder)
        return
    for _ in range(2):
        open_dataset(folder)
    assert reads == ["train.bin", "val.bin"]


def test_hash_cache_of_a_newer_mlxgpt_is_not_overwritten(
    tmp_path: Path, data: DataConfig, reads: ReadLog
) -> None:
    folder = find_or_prepare(PrepareRequest(data), tmp_path / "data").folder
    text = dump_checksummed({"format": 2, "known": {}})
    (folder / "verified.json").write_text(text)
    reads.clear()
    for _ in range(2):
        open_dataset(folder)
    assert reads == ["train.bin", "val.bin"] * 2
    assert (folder / "verified.json").read_text() == text


def test_without_a_writable_cache_files_are_read_each_time(
    tmp_path: Path, data: DataConfig, reads: ReadLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = find_or_prepare(PrepareRequest(data), tmp_path / "data").folder
    (folder / "verified.json").unlink()

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("mlxgpt.utils.files.write_atomically", refuse)
    reads.clear()
    for _ in range(2):
        open_dataset(folder)
    assert reads == ["train.bin", "val.bin"] * 2


def test_file_that_changes_while_it_is_read_is_not_cached(tmp_path: Path) -> None:
    path, cache, computations = tmp_path / "file", HashCache(tmp_path), 0
    path.write_text("before")

    def compute() -> dict[str, int]:
        nonlocal computations
        computations += 1
        if computations == 1:
            path.write_text("after!!")
        return {"times": computations}

    assert [cache.get_or_compute("file", [path], compute)["times"] for _ in range(3)] == [1, 2, 2]


def test_nanogpt_arrays_are_read_once(tmp_path: Path, reads: ReadLog) -> None:
    for split in ("train", "val"):
        np.array([0, 1, 0], dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    vocabulary = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(vocabulary))
    metas = [open_dataset(tmp_path).meta for _ in range(2)]
    assert metas[0] == metas[1]
    assert reads == ["train.bin", "val.bin"]
    open_dataset(tmp_path, verify=True)
    assert reads[2:] == ["train.bin", "val.bin"]


def test_dataset_is_used_after_its_source_was_deleted(
    tmp_path: Path, data: DataConfig, notes: list[str]
) -> None:
    before = find_or_prepare(PrepareRequest(data), tmp_path / "data")
    notes.clear()
    (tmp_path / "one.txt").unlink()
    assert find_or_prepare(PrepareRequest(data), tmp_path / "data").meta == before.meta
    one = tmp_path / "one.txt"
    expected = f"{one} no longer exists; using {before.folder}, which was prepared from it"
    assert notes == [expected]


@pytest.mark.parametrize("other", ["another folder", "another validation text", "tokenizer"])
def test_dataset_of_another_deleted_source_is_not_used(
    tmp_path: Path, data: DataConfig, other: str
) -> None:
    find_or_prepare(PrepareRequest(data, name="x"), tmp_path / "data")
    (tmp_path / "one.txt").unlink()
    source, val = data.source[0], data.val_source[0]
    config = {
        "another folder": DataConfig((str(tmp_path / "sub" / "one.txt"),), (val,)),
        "another validation text": DataConfig((source,), (str(tmp_path / "other.txt"),)),
        "tokenizer": DataConfig((source,), (val,), tokenizer="gpt2"),
    }[other]
    with pytest.raises(UserError, match=r"no file|was prepared from different data"):
        find_or_prepare(PrepareRequest(config, name="x"), tmp_path / "data")
