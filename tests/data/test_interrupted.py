"""Preparations that are interrupted, killed, or fail."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxgpt.config import DataConfig
from mlxgpt.data import prepare_job, sources
from mlxgpt.data.prepare import find_or_prepare
from mlxgpt.data.prepare_job import PrepareRequest
from mlxgpt.data.readers import DocumentPiece
from mlxgpt.data.sources import Source
from mlxgpt.data.tokenizers.base import END_OF_TEXT
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError
from tests.helpers.preparation import PrepareRecorder, prepare_and_read, read_folder_files


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("enough", [0, 1, 2, 3, 7, 40])
def test_resumed_preparation_is_byte_identical(
    tmp_path: Path, documents_file: Path, kind: str, enough: int
) -> None:
    uninterrupted, data = PrepareRecorder(), tmp_path / "data"
    expected = prepare_and_read(documents_file, tmp_path / "whole", kind, uninterrupted)
    interrupted = PrepareRecorder(enough)
    with pytest.raises(KeyboardInterrupt):
        prepare_and_read(documents_file, data, kind, interrupted)
    assert interrupted.lines[-1] == "run the same command again to resume from here"
    assert [path.name for path in data.iterdir()] == [".x.new"], "nothing under its final name"
    resumed = PrepareRecorder()
    assert prepare_and_read(documents_file, data, kind, resumed) == expected
    saved_chunks = enough // 3 * 3
    assert uninterrupted.chunks > 50
    assert resumed.chunks == uninterrupted.chunks - saved_chunks, (
        "what was saved is not encoded again"
    )
    assert any(line.startswith("resuming after") for line in resumed.lines) == (saved_chunks > 0)
    assert [path.name for path in data.iterdir()] == ["x"]


def test_preparation_finishes_despite_repeated_interruptions(
    tmp_path: Path, documents_file: Path
) -> None:
    expected = prepare_and_read(documents_file, tmp_path / "whole", "bpe", PrepareRecorder())
    for _ in range(100):
        try:
            assert (
                prepare_and_read(documents_file, tmp_path / "data", "bpe", PrepareRecorder(8))
                == expected
            )
            return
        except KeyboardInterrupt:
            continue
    pytest.fail("it never got there")


@pytest.mark.parametrize("where", ["reading", "hashing", "renaming"])
def test_interruption_before_or_after_encoding(
    tmp_path: Path, documents_file: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    expected = prepare_and_read(documents_file, tmp_path / "whole", "bpe", PrepareRecorder())
    with monkeypatch.context() as patch:
        if where == "hashing":
            patch.setattr(prepare_job, "scan_token_file", interrupt)
        if where == "renaming":
            patch.setattr(Path, "rename", interrupt)
        interrupted = PrepareRecorder(9, stage=where)
        with pytest.raises(KeyboardInterrupt):
            prepare_and_read(documents_file, tmp_path / "data", "bpe", interrupted)
    assert interrupted.lines[-1].startswith(
        "run the same command again to "
        + ("start over" if where == "reading" else "resume from here")
    )
    assert not (tmp_path / "data" / "x").exists()
    assert prepare_and_read(documents_file, tmp_path / "data", "bpe", PrepareRecorder()) == expected


def change_field(path: Path, key: str, value: object) -> None:
    tree = json_files.read_checksummed(path, 1)
    path.write_text(json_files.dump_checksummed({**tree, key: value}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "another text": lambda folder: change_field(
        folder / "unfinished.json", "origin", {"sha256": "0"}
    ),
    "another version": lambda folder: change_field(folder / "unfinished.json", "version", "0.0.1"),
    "a newer format": lambda folder: change_field(folder / "unfinished.json", "format", 99),
    "other fields": lambda folder: change_field(folder / "unfinished.json", "sharing", {"odd": 1}),
    "no sharing": lambda folder: change_field(folder / "unfinished.json", "sharing", None),
    "no plan": lambda folder: (folder / "unfinished.json").unlink(),
    "broken plan": lambda folder: (folder / "unfinished.json").write_text("{"),
    "edited plan": lambda folder: (folder / "unfinished.json").write_text(
        (folder / "unfinished.json").read_text().replace('"every": 100', '"every": 99')
    ),
    "broken progress": lambda folder: (folder / "progress.json").write_bytes(b"\xff\x00"),
    "edited progress": lambda folder: (folder / "progress.json").write_text(
        (folder / "progress.json").read_text().replace('"chunks": 6', '"chunks": 7')
    ),
    "half a progress": lambda folder: change_field(folder / "progress.json", "val", {}),
    "short array": lambda folder: os.truncate(folder / "train.bin", 9),
    "no array": lambda folder: (folder / "val.bin").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "broken tokenizer": lambda folder: (folder / "tokenizer.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_leftovers_that_do_not_match_are_not_resumed(
    tmp_path: Path, documents_file: Path, damage: str
) -> None:
    uninterrupted, restarted = PrepareRecorder(), PrepareRecorder()
    expected = prepare_and_read(documents_file, tmp_path / "whole", "bpe", uninterrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_and_read(documents_file, tmp_path / "data", "bpe", PrepareRecorder(7))
    before = read_folder_files(tmp_path / "data" / ".x.new")
    DAMAGES[damage](tmp_path / "data" / ".x.new")
    assert read_folder_files(tmp_path / "data" / ".x.new") != before
    assert prepare_and_read(documents_file, tmp_path / "data", "bpe", restarted) == expected
    assert restarted.chunks == uninterrupted.chunks, "begun again"
    reasons = [line for line in restarted.lines if "starting over" in line]
    assert len(reasons) == (damage != "no plan")


def test_data_after_the_last_save_is_truncated(tmp_path: Path, documents_file: Path) -> None:
    expected = prepare_and_read(documents_file, tmp_path / "whole", "char", PrepareRecorder())
    with pytest.raises(KeyboardInterrupt):
        prepare_and_read(documents_file, tmp_path / "data", "char", PrepareRecorder(7))
    for split in ("train", "val"):
        with (tmp_path / "data" / ".x.new" / f"{split}.bin").open("ab") as array:
            array.write(b"half a chunk!")
    resumed = PrepareRecorder()
    assert prepare_and_read(documents_file, tmp_path / "data", "char", resumed) == expected
    assert any(line.startswith("resuming") for line in resumed.lines)


def test_changed_source_starts_over(tmp_path: Path, documents_file: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare_and_read(documents_file, tmp_path / "data", "char", PrepareRecorder(7))
    documents_file.write_text(documents_file.read_text(encoding="utf-8") + "!", encoding="utf-8")
    expected = prepare_and_read(documents_file, tmp_path / "whole", "char", PrepareRecorder())
    assert (
        prepare_and_read(documents_file, tmp_path / "data", "char", PrepareRecorder()) == expected
    )


PROGRAM = """
import sys
from pathlib import Path
from mlxgpt.config import DataConfig
from mlxgpt.data import prepare, prepare_job, tokenize
tokenize.CHUNK_CHARS, prepare_job.SAVE_EVERY_CHUNKS = 200, 3
data = DataConfig((sys.argv[1],), tokenizer="bpe")
request = prepare_job.PrepareRequest(data, vocab_size=280, name="x")
prepare.find_or_prepare(request, Path(sys.argv[2]))
"""


def test_killed_preparation_resumes_byte_identically(tmp_path: Path, documents_file: Path) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    documents_file.write_text(
        END_OF_TEXT.join(documents_file.read_text(encoding="utf-8").split(END_OF_TEXT) * 4)
    )
    expected = prepare_and_read(documents_file, tmp_path / "whole", "bpe", PrepareRecorder())
    scratch, folder = tmp_path / "data" / ".x.new", tmp_path / "data" / "x"
    for is_last in (False, False, True):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, documents_file, tmp_path / "data"]
        )
        while not is_last and process.poll() is None and not (scratch / "progress.json").exists():
            time.sleep(0.001)
        if not is_last:
            time.sleep(rng.random() * 0.3)
            process.kill()
        assert process.wait() == 0 or not is_last
        assert not folder.exists() or read_folder_files(folder) == expected, "whole or not there"
    assert read_folder_files(folder) == expected


ERRORS = [OSError(28, "No space left on device", "train.bin"), MemoryError(), ZeroDivisionError()]


class FailingRecorder(PrepareRecorder):
    """Raises an error after `after_chunks` chunks."""

    def __init__(self, error: Exception, after_chunks: int) -> None:
        super().__init__()
        self.error, self.after_chunks = error, after_chunks

    def progress(self, stage: str, done: int, total: int) -> None:
        super().progress(stage, done, total)
        if self.chunks > self.after_chunks:
            raise self.error


@pytest.mark.parametrize("when", [1, 20])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_preparation_resumes_after_an_error(
    tmp_path: Path, documents_file: Path, when: int, error: Exception
) -> None:
    uninterrupted, failing, resumed = (
        PrepareRecorder(),
        FailingRecorder(error, when),
        PrepareRecorder(),
    )
    expected = prepare_and_read(documents_file, tmp_path / "whole", "char", uninterrupted)
    with pytest.raises(type(error)):
        prepare_and_read(documents_file, tmp_path / "data", "char", failing)
    assert failing.lines[-1] == "run the same command again to resume from here"
    assert prepare_and_read(documents_file, tmp_path / "data", "char", resumed) == expected
    assert resumed.chunks == uninterrupted.chunks - when // 3 * 3
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["x"]


@pytest.mark.parametrize("when", [0, 1, 20])
def test_error_in_the_data_leaves_nothing_behind(
    tmp_path: Path, documents_file: Path, when: int
) -> None:
    failing = FailingRecorder(UserError("line 9 is not a JSON object", "correct it."), when)
    with pytest.raises(UserError, match="line 9 is not"):
        prepare_and_read(documents_file, tmp_path / "data", "char", failing)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("reading", [1, 2])
def test_source_that_fails_while_it_is_read_leaves_nothing_behind(
    tmp_path: Path, kind: str, reading: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Documents:
        readings = 0

        def __iter__(self) -> Documents:
            self.readings += 1
            self.n = 0
            return self

        def __next__(self) -> DocumentPiece:
            self.n += 1
            if self.n > 50 and self.readings == reading:
                raise UserError("the file has gone", "bring it back.")
            if self.n > 100:
                raise StopIteration
            return DocumentPiece(f"document {self.n}")

    source = Source("x", {}, Documents(), None, size=1000)
    monkeypatch.setattr(sources, "open_source", lambda *arguments: source)
    with pytest.raises(UserError, match="the file has gone"):
        find_or_prepare(
            PrepareRequest(DataConfig(("x.txt",), tokenizer=kind), vocab_size=300), tmp_path
        )
    assert list(tmp_path.iterdir()) == []


def test_only_one_process_prepares_a_folder(tmp_path: Path, documents_file: Path) -> None:
    with (
        files.file_lock(tmp_path / "data" / "x", "preparing"),
        pytest.raises(UserError, match="another process is already preparing"),
    ):
        prepare_and_read(documents_file, tmp_path / "data", "char", PrepareRecorder())
