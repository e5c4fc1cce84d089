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
from mlxgpt.data import prepare, sources
from mlxgpt.data.prepare import PrepareRequest, find_or_prepare
from mlxgpt.data.readers import DocumentPiece
from mlxgpt.data.sources import Source
from mlxgpt.data.tokenizers.base import END_OF_TEXT
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError
from tests.helpers.preparation import Recorder, contents, prepared


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("enough", [0, 1, 2, 3, 7, 40])
def test_who_is_interrupted_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, many: Path, kind: str, enough: int
) -> None:
    whole, data = Recorder(), tmp_path / "data"
    expected = prepared(many, tmp_path / "whole", kind, whole)
    interrupted = Recorder(enough)
    with pytest.raises(KeyboardInterrupt):
        prepared(many, data, kind, interrupted)
    assert interrupted.lines[-1] == "the same command continues from here"
    assert [path.name for path in data.iterdir()] == [".x.new"], "nothing under its final name"
    again = Recorder()
    assert prepared(many, data, kind, again) == expected
    saved = enough // 3 * 3
    assert whole.chunks > 50
    assert again.chunks == whole.chunks - saved, "what was saved is not encoded again"
    assert any(line.startswith("continuing after") for line in again.lines) == (saved > 0)
    assert [path.name for path in data.iterdir()] == ["x"]


def test_who_is_interrupted_again_and_again_gets_there(tmp_path: Path, many: Path) -> None:
    expected = prepared(many, tmp_path / "whole", "bpe", Recorder())
    for _ in range(100):
        try:
            assert prepared(many, tmp_path / "data", "bpe", Recorder(8)) == expected
            return
        except KeyboardInterrupt:
            continue
    pytest.fail("it never got there")


@pytest.mark.parametrize("where", ["reading", "hashing", "renaming"])
def test_an_interruption_before_or_after_the_arrays_loses_nothing(
    tmp_path: Path, many: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    expected = prepared(many, tmp_path / "whole", "bpe", Recorder())
    with monkeypatch.context() as patch:
        if where == "hashing":
            patch.setattr(prepare, "scan_token_file", interrupt)
        if where == "renaming":
            patch.setattr(Path, "rename", interrupt)
        interrupted = Recorder(9, doing=where)
        with pytest.raises(KeyboardInterrupt):
            prepared(many, tmp_path / "data", "bpe", interrupted)
    assert interrupted.lines[-1].startswith(
        "the same command begins again" if where == "reading" else "the same command continues"
    )
    assert not (tmp_path / "data" / "x").exists()
    assert prepared(many, tmp_path / "data", "bpe", Recorder()) == expected


def change(path: Path, key: str, value: object) -> None:
    tree = files.read_checksummed(path, 1)
    path.write_text(files.dump_checksummed({**tree, key: value}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "another text": lambda f: change(f / "unfinished.json", "origin", {"sha256": "0"}),
    "another version": lambda f: change(f / "unfinished.json", "version", "0.0.1"),
    "a newer format": lambda f: change(f / "unfinished.json", "format", 99),
    "other fields": lambda f: change(f / "unfinished.json", "sharing", {"odd": 1}),
    "no sharing": lambda f: change(f / "unfinished.json", "sharing", None),
    "no plan": lambda f: (f / "unfinished.json").unlink(),
    "broken plan": lambda f: (f / "unfinished.json").write_text("{"),
    "edited plan": lambda f: (f / "unfinished.json").write_text(
        (f / "unfinished.json").read_text().replace('"every": 100', '"every": 99')
    ),
    "broken progress": lambda f: (f / "progress.json").write_bytes(b"\xff\x00"),
    "edited progress": lambda f: (f / "progress.json").write_text(
        (f / "progress.json").read_text().replace('"chunks": 6', '"chunks": 7')
    ),
    "half a progress": lambda f: change(f / "progress.json", "val", {}),
    "short array": lambda f: os.truncate(f / "train.bin", 9),
    "no array": lambda f: (f / "val.bin").unlink(),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "broken tokenizer": lambda f: (f / "tokenizer.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_left_of_something_else_is_not_continued(
    tmp_path: Path, many: Path, damage: str
) -> None:
    whole, again = Recorder(), Recorder()
    expected = prepared(many, tmp_path / "whole", "bpe", whole)
    with pytest.raises(KeyboardInterrupt):
        prepared(many, tmp_path / "data", "bpe", Recorder(7))
    before = contents(tmp_path / "data" / ".x.new")
    DAMAGES[damage](tmp_path / "data" / ".x.new")
    assert contents(tmp_path / "data" / ".x.new") != before
    assert prepared(many, tmp_path / "data", "bpe", again) == expected
    assert again.chunks == whole.chunks, "begun again"
    reasons = [line for line in again.lines if "cannot be continued, so it is begun again" in line]
    assert len(reasons) == (damage != "no plan")


def test_what_came_after_the_last_save_is_cut_off(tmp_path: Path, many: Path) -> None:
    expected = prepared(many, tmp_path / "whole", "char", Recorder())
    with pytest.raises(KeyboardInterrupt):
        prepared(many, tmp_path / "data", "char", Recorder(7))
    for split in ("train", "val"):
        with (tmp_path / "data" / ".x.new" / f"{split}.bin").open("ab") as array:
            array.write(b"half a chunk!")
    again = Recorder()
    assert prepared(many, tmp_path / "data", "char", again) == expected
    assert any(line.startswith("continuing") for line in again.lines)


def test_a_text_that_was_changed_is_begun_anew(tmp_path: Path, many: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepared(many, tmp_path / "data", "char", Recorder(7))
    many.write_text(many.read_text(encoding="utf-8") + "!", encoding="utf-8")
    expected = prepared(many, tmp_path / "whole", "char", Recorder())
    assert prepared(many, tmp_path / "data", "char", Recorder()) == expected


PROGRAM = """
import sys
from pathlib import Path
from mlxgpt.config import DataConfig
from mlxgpt.data import prepare, tokenize
tokenize.CHUNK_CHARS, prepare.SAVE_EVERY_CHUNKS = 200, 3
data = DataConfig((sys.argv[1],), tokenizer="bpe")
request = prepare.PrepareRequest(data, vocab_size=280, name="x")
prepare.find_or_prepare(request, Path(sys.argv[2]))
"""


def test_who_is_killed_at_any_moment_goes_on(tmp_path: Path, many: Path) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    many.write_text(END_OF_TEXT.join(many.read_text(encoding="utf-8").split(END_OF_TEXT) * 4))
    expected = prepared(many, tmp_path / "whole", "bpe", Recorder())
    scratch, folder = tmp_path / "data" / ".x.new", tmp_path / "data" / "x"
    for last in (False, False, True):
        program = subprocess.Popen([sys.executable, "-c", PROGRAM, many, tmp_path / "data"])
        while not last and program.poll() is None and not (scratch / "progress.json").exists():
            time.sleep(0.001)
        if not last:
            time.sleep(draw.random() * 0.3)
            program.kill()
        assert program.wait() == 0 or not last
        assert not folder.exists() or contents(folder) == expected, "whole or not there"
    assert contents(folder) == expected


ERRORS = [OSError(28, "No space left on device", "train.bin"), MemoryError(), ZeroDivisionError()]


class Failing(Recorder):
    """Raises an error after some chunks."""

    def __init__(self, error: Exception, when: int) -> None:
        super().__init__()
        self.error, self.when = error, when

    def progress(self, doing: str, done: int, total: int) -> None:
        super().progress(doing, done, total)
        if self.chunks > self.when:
            raise self.error


@pytest.mark.parametrize("when", [1, 20])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_keeps_what_a_kill_keeps(
    tmp_path: Path, many: Path, when: int, error: Exception
) -> None:
    whole, failing, again = Recorder(), Failing(error, when), Recorder()
    expected = prepared(many, tmp_path / "whole", "char", whole)
    with pytest.raises(type(error)):
        prepared(many, tmp_path / "data", "char", failing)
    assert failing.lines[-1] == "the same command continues from here"
    assert prepared(many, tmp_path / "data", "char", again) == expected
    assert again.chunks == whole.chunks - when // 3 * 3
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["x"]


@pytest.mark.parametrize("when", [0, 1, 20])
def test_a_mistake_in_the_text_leaves_nothing_behind(tmp_path: Path, many: Path, when: int) -> None:
    failing = Failing(UserError("line 9 is not a JSON object", "correct it."), when)
    with pytest.raises(UserError, match="line 9 is not"):
        prepared(many, tmp_path / "data", "char", failing)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("reading", [1, 2])
def test_a_source_that_fails_while_it_is_read_leaves_nothing_behind(
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


def test_only_one_process_prepares_a_folder(tmp_path: Path, many: Path) -> None:
    with (
        files.file_lock(tmp_path / "data" / "x", "preparing"),
        pytest.raises(UserError, match="another process is preparing"),
    ):
        prepared(many, tmp_path / "data", "char", Recorder())
