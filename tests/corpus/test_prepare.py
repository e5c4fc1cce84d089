from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlxgpt import files
from mlxgpt.config import DataConfig
from mlxgpt.corpus import prepare, sources
from mlxgpt.corpus.bpe import BPETokenizer
from mlxgpt.corpus.prepare import Unwatched, find_or_prepare
from mlxgpt.corpus.readers import Piece
from mlxgpt.corpus.sources import Source
from mlxgpt.corpus.tokenizer import END_OF_TEXT, CharTokenizer
from mlxgpt.corpus.tokens import open_dataset
from mlxgpt.errors import UserError

FILES = {"train.bin", "val.bin", "meta.json", "tokenizer.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Watcher(Unwatched):
    """Remembers what it is told; after so many chunks or characters it has had enough."""

    def __init__(self, enough: int | None = None, *, doing: str = "encoding") -> None:
        self.lines: list[str] = []
        self.chunks = 0
        self.enough, self.doing = enough, doing

    def note(self, line: str) -> None:
        self.lines.append(line)

    def progress(self, doing: str, done: int, total: int) -> None:
        self.chunks += doing == "encoding"
        if doing == self.doing and self.enough is not None:
            self.enough -= 1
            if self.enough < 0:
                raise KeyboardInterrupt


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of many documents, prepared in many chunks."""
    monkeypatch.setattr(prepare, "CHUNK", 200)
    monkeypatch.setattr(prepare, "SAVE_EVERY", 3)
    draw = random.Random(1)
    words = ["one", "two\n", "three,", "Grüße", "🙂", "  ", "four hundred"]
    texts = [" ".join(draw.choices(words, k=draw.randrange(1, 40))) for _ in range(150)]
    path = tmp_path / "many.txt"
    path.write_text(END_OF_TEXT.join(texts), encoding="utf-8")
    return path


def prepared(source: Path, data_dir: Path, kind: str, watcher: Watcher) -> dict[str, bytes]:
    data = DataConfig((str(source),), tokenizer=kind)
    folder = find_or_prepare(data, data_dir, vocab_size=280, name="x", watcher=watcher).folder
    return contents(folder)


def test_arrays_are_what_nanogpt_reads(tmp_path: Path, text_file: Path) -> None:
    dataset = find_or_prepare(DataConfig((str(text_file),)), tmp_path / "data")
    raw = np.memmap(dataset.folder / "train.bin", dtype=np.uint16, mode="r")
    text = text_file.read_text(encoding="utf-8")
    assert dataset.tokenizer.decode(raw) == text[: int(len(text) * 0.9)]
    assert {path.name for path in dataset.folder.iterdir()} == FILES
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["words"]


def test_a_vocabulary_beyond_two_bytes_has_arrays_of_four(tmp_path: Path) -> None:
    text = "".join(chr(n) for n in range(1, 0x12000) if not 0xD800 <= n < 0xE000)
    path = tmp_path / "all.txt"
    path.write_text(text, newline="")
    dataset = find_or_prepare(DataConfig((str(path),)), tmp_path)
    assert dataset.meta.dtype == "<u4"
    assert dataset.meta.vocab_size == len(text) > 1 << 16
    assert dataset.tokenizer.decode([*dataset.train.ids, *dataset.val.ids]) == text
    assert dataset.meta.train.tokens * 4 == (dataset.folder / "train.bin").stat().st_size


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("enough", [0, 1, 2, 3, 7, 40])
def test_who_is_interrupted_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, many: Path, kind: str, enough: int
) -> None:
    whole, data = Watcher(), tmp_path / "data"
    expected = prepared(many, tmp_path / "whole", kind, whole)
    interrupted = Watcher(enough)
    with pytest.raises(KeyboardInterrupt):
        prepared(many, data, kind, interrupted)
    assert interrupted.lines[-1] == "the same command goes on from here"
    assert [path.name for path in data.iterdir()] == [".x.new"], "nothing under its final name"
    again = Watcher()
    assert prepared(many, data, kind, again) == expected
    saved = enough // 3 * 3
    assert whole.chunks > 50
    assert again.chunks == whole.chunks - saved, "what was saved is not encoded again"
    assert any(line.startswith("going on after") for line in again.lines) == (saved > 0)
    assert [path.name for path in data.iterdir()] == ["x"]


def test_who_is_interrupted_again_and_again_gets_there(tmp_path: Path, many: Path) -> None:
    expected = prepared(many, tmp_path / "whole", "bpe", Watcher())
    for _ in range(100):
        try:
            assert prepared(many, tmp_path / "data", "bpe", Watcher(8)) == expected
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

    expected = prepared(many, tmp_path / "whole", "bpe", Watcher())
    with monkeypatch.context() as patch:
        if where == "hashing":
            sha256 = files.sha256
            patch.setattr(
                files, "sha256", lambda p: interrupt() if p.suffix == ".bin" else sha256(p)
            )
        if where == "renaming":
            patch.setattr(Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepared(many, tmp_path / "data", "bpe", Watcher(9, doing=where))
    assert not (tmp_path / "data" / "x").exists()
    assert prepared(many, tmp_path / "data", "bpe", Watcher()) == expected


def change(path: Path, key: str, value: object) -> None:
    tree = files.read_sealed(path, 1)
    path.write_text(files.sealed({**tree, key: value}))


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
def test_what_is_left_of_something_else_is_not_gone_on_with(
    tmp_path: Path, many: Path, damage: str
) -> None:
    whole, again = Watcher(), Watcher()
    expected = prepared(many, tmp_path / "whole", "bpe", whole)
    with pytest.raises(KeyboardInterrupt):
        prepared(many, tmp_path / "data", "bpe", Watcher(7))
    before = contents(tmp_path / "data" / ".x.new")
    DAMAGES[damage](tmp_path / "data" / ".x.new")
    assert contents(tmp_path / "data" / ".x.new") != before
    assert prepared(many, tmp_path / "data", "bpe", again) == expected
    assert again.chunks == whole.chunks, "begun anew"


def test_what_came_after_the_last_save_is_cut_off(tmp_path: Path, many: Path) -> None:
    expected = prepared(many, tmp_path / "whole", "char", Watcher())
    with pytest.raises(KeyboardInterrupt):
        prepared(many, tmp_path / "data", "char", Watcher(7))
    for split in ("train", "val"):
        with (tmp_path / "data" / ".x.new" / f"{split}.bin").open("ab") as array:
            array.write(b"half a chunk!")
    again = Watcher()
    assert prepared(many, tmp_path / "data", "char", again) == expected
    assert any(line.startswith("going on") for line in again.lines)


def test_a_text_that_was_changed_is_begun_anew(tmp_path: Path, many: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepared(many, tmp_path / "data", "char", Watcher(7))
    many.write_text(many.read_text(encoding="utf-8") + "!", encoding="utf-8")
    expected = prepared(many, tmp_path / "whole", "char", Watcher())
    assert prepared(many, tmp_path / "data", "char", Watcher()) == expected


PROGRAM = """
import sys
from pathlib import Path
from mlxgpt.config import DataConfig
from mlxgpt.corpus import prepare
prepare.CHUNK, prepare.SAVE_EVERY = 200, 3
data = DataConfig((sys.argv[1],), tokenizer="bpe")
prepare.find_or_prepare(data, Path(sys.argv[2]), vocab_size=280, name="x")
"""


def test_who_is_killed_at_any_moment_goes_on(tmp_path: Path, many: Path) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    many.write_text(END_OF_TEXT.join(many.read_text(encoding="utf-8").split(END_OF_TEXT) * 4))
    expected = prepared(many, tmp_path / "whole", "bpe", Watcher())
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


@pytest.mark.parametrize("when", [0, 1, 20])
@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (OSError(28, "No space left on device"), "cannot write .*: No space left on device"),
        (UserError("the file has gone", "bring it back."), "the file has gone"),
    ],
)
def test_a_failure_halfway_leaves_nothing_behind(
    tmp_path: Path, many: Path, when: int, error: Exception, problem: str
) -> None:
    class Failing(Watcher):
        def progress(self, doing: str, done: int, total: int) -> None:
            super().progress(doing, done, total)
            if self.chunks > when:
                raise error

    with pytest.raises(UserError, match=problem):
        prepared(many, tmp_path / "data", "char", Failing())
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

        def __next__(self) -> Piece:
            self.n += 1
            if self.n > 50 and self.readings == reading:
                raise UserError("the file has gone", "bring it back.")
            if self.n > 100:
                raise StopIteration
            return Piece(f"document {self.n}")

    source = Source("x", {}, Documents(), None, size=1000)
    monkeypatch.setattr(sources, "open_source", lambda *arguments: source)
    with pytest.raises(UserError, match="the file has gone"):
        find_or_prepare(DataConfig(("x.txt",), tokenizer=kind), tmp_path, vocab_size=300)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_fails_is_not_hidden(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(self: CharTokenizer, text: str) -> np.ndarray:
        raise ZeroDivisionError

    monkeypatch.setattr(CharTokenizer, "encode", encode)
    with pytest.raises(ZeroDivisionError):
        prepared(many, tmp_path / "data", "char", Watcher())
    assert list((tmp_path / "data").iterdir()) == []


def test_only_one_process_prepares_a_folder(tmp_path: Path, many: Path) -> None:
    with (
        files.only_one(tmp_path / "data" / "x", "preparing"),
        pytest.raises(UserError, match="another process is preparing"),
    ):
        prepared(many, tmp_path / "data", "char", Watcher())


def test_what_is_prepared_is_not_prepared_again(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = DataConfig((str(text_file),)), tmp_path / "data"
    first = find_or_prepare(data, folder)
    monkeypatch.setattr(prepare, "_Preparation", None)
    assert find_or_prepare(data, folder).meta == first.meta
    for name in ("words", str(folder / "words")):  # by its name, and by its folder
        assert find_or_prepare(DataConfig((name,)), folder).meta == first.meta


def test_names_tell_the_tokenizer(tmp_path: Path, text_file: Path, gpt2: BPETokenizer) -> None:
    source, found = (str(text_file),), {}
    for kind, vocab_size in (("char", 0), ("bpe", 280), ("bpe", 281), ("gpt2", 0)):
        data = DataConfig(source, tokenizer=kind)
        dataset = find_or_prepare(data, tmp_path / "data", vocab_size=vocab_size)
        found[dataset.name] = dataset.meta.vocab_size
        again = find_or_prepare(data, tmp_path / "data", vocab_size=vocab_size)
        assert again.meta == dataset.meta
    sizes = {"words-bpe280": 280, "words-bpe281": 281, "words-gpt2": 50257}
    assert found == {"words": found["words"], **sizes}


def test_without_a_size_a_bpe_has_the_usual_one(tmp_path: Path, text_file: Path) -> None:
    data = DataConfig((str(text_file),), tokenizer="bpe")
    watcher = Watcher()
    dataset = find_or_prepare(data, tmp_path / "data", watcher=watcher)
    assert dataset.name == "words-bpe4096"
    given = f"the text gives a vocabulary of {dataset.meta.vocab_size:,}, not 4,096"
    assert given in watcher.lines


def test_a_text_that_gives_a_smaller_vocabulary_may_be_refused(
    tmp_path: Path, text_file: Path
) -> None:
    data, folder = DataConfig((str(text_file),), tokenizer="bpe"), tmp_path / "data"
    with pytest.raises(UserError, match=r"gives a vocabulary of \d+, not 5,000") as caught:
        find_or_prepare(data, folder, vocab_size=5000, strict=True)
    assert list(folder.iterdir()) == []
    size = int(caught.value.remedy.split("--vocab-size ")[1].split(",")[0])
    exact = find_or_prepare(data, folder, vocab_size=size, strict=True)
    assert exact.meta.vocab_size == size
    watcher = Watcher()
    lenient = find_or_prepare(data, folder, vocab_size=5000, watcher=watcher)
    assert lenient.tokenizer.fingerprint == exact.tokenizer.fingerprint
    assert any(f"a vocabulary of {size}, not 5,000" in line for line in watcher.lines)


@pytest.mark.parametrize("vocab_size", [1, 256])
def test_a_vocabulary_that_is_too_small_is_refused_at_once(
    tmp_path: Path, text_file: Path, vocab_size: int
) -> None:
    data = DataConfig((str(text_file),), tokenizer="bpe")
    with pytest.raises(UserError, match="too small for byte-level BPE"):
        find_or_prepare(data, tmp_path / "data", vocab_size=vocab_size)
    assert not (tmp_path / "data").exists()


def test_a_vocabulary_of_bytes_alone_is_large_enough(tmp_path: Path, text_file: Path) -> None:
    data = DataConfig((str(text_file),), tokenizer="bpe")
    dataset = find_or_prepare(data, tmp_path / "data", vocab_size=257)
    text = text_file.read_bytes()
    assert dataset.meta.vocab_size == 257
    assert dataset.meta.train.tokens + dataset.meta.val.tokens == len(text) + 2


@pytest.mark.parametrize("corpus", ["words.txt", "storybook"])
@pytest.mark.parametrize("first", ["char", "bpe"])
def test_another_tokenizer_does_not_take_a_name_that_is_taken(
    home: Path, text_file: Path, corpus: str, first: str
) -> None:
    length = 0.05 if corpus == "storybook" else None
    folder = home / "data"

    def find(kind: str, vocab_size: int = 280) -> str:
        return find_or_prepare(
            DataConfig((corpus,), tokenizer=kind),
            folder,
            vocab_size=vocab_size,
            name="x",
            megabytes=length,
        ).meta.tokenizer

    before = find(first)
    other = "bpe" if first == "char" else "char"
    with pytest.raises(UserError, match="from another text, or with another tokenizer"):
        find(other)
    assert find(first) == before
    if first == "bpe":
        with pytest.raises(UserError, match="with another tokenizer"):
            find("bpe", 281)


def test_another_text_does_not_take_a_name_that_is_taken(tmp_path: Path, text_file: Path) -> None:
    data, folder = DataConfig((str(text_file),)), tmp_path / "data"
    before = find_or_prepare(data, folder)
    text_file.write_text("Something else altogether.")
    with pytest.raises(UserError, match="was prepared from another text") as caught:
        find_or_prepare(data, folder)
    assert "--name NAME" in caught.value.remedy
    assert open_dataset(before.folder).meta == before.meta
    other = find_or_prepare(data, folder, name="other")
    assert other.folder == folder / "other"


def test_a_corpus_of_the_hub_that_is_here_needs_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = sources.corpus_origin("shakespeare")
    train, val = [Piece("to be", last=False)], [Piece("or not", last=False)]
    source = Source("shakespeare", origin, train, val, size=5, single=True)
    monkeypatch.setattr(sources, "open_source", lambda *arguments: source)
    first = find_or_prepare(DataConfig(), tmp_path)
    assert first.tokenizer.decode(first.train.ids) == "to be"
    monkeypatch.setattr(sources, "open_source", None)
    assert find_or_prepare(DataConfig(), tmp_path).name == "shakespeare"
    with pytest.raises(UserError, match="only the storybook"):
        find_or_prepare(DataConfig(), tmp_path, megabytes=3)
    with pytest.raises(UserError, match="has its own text to judge by"):
        find_or_prepare(DataConfig(val_source=("x.txt",)), tmp_path)


def test_a_storybook_that_is_here_is_not_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(("storybook",))
    first = find_or_prepare(data, tmp_path, megabytes=0.05)
    monkeypatch.setattr(sources, "open_source", None)
    for megabytes in (None, 0.05):
        assert find_or_prepare(data, tmp_path, megabytes=megabytes).meta == first.meta
    with pytest.raises(UserError, match="was prepared from another text"):
        find_or_prepare(data, tmp_path, megabytes=0.06)


def test_validation_text_makes_another_corpus(tmp_path: Path, text_file: Path) -> None:
    val = tmp_path / "val.txt"
    val.write_text("to be or not, plain", encoding="utf-8")
    folder = tmp_path / "data"
    find_or_prepare(DataConfig((str(text_file),), (str(val),)), folder)
    with pytest.raises(UserError, match="was prepared from another text"):
        find_or_prepare(DataConfig((str(text_file),)), folder)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "data" / "words").mkdir(parents=True)
    (tmp_path / "data" / "words" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds no prepared data"):
        find_or_prepare(DataConfig((str(text_file),)), tmp_path / "data")
    assert (tmp_path / "data" / "words" / "mine.txt").read_text() == "precious"


def test_how_it_goes_is_told(tmp_path: Path, many: Path) -> None:
    told: list[tuple[str, int, int]] = []

    class Told(Watcher):
        def progress(self, doing: str, done: int, total: int) -> None:
            told.append((doing, done, total))

    prepared(many, tmp_path / "data", "bpe", watcher := Told())
    assert watcher.lines == [f"preparing {many} in {tmp_path / 'data' / 'x'}"]
    size = many.stat().st_size
    assert {total for _, _, total in told} == {size}
    for doing in ("reading", "encoding"):
        done = [n for what, n, _ in told if what == doing]
        assert done == sorted(done)
        assert 0.8 * size < done[-1] <= size


MEMORY = """
import resource, sys
from pathlib import Path
import numpy, tokenizers
from mlxgpt.config import DataConfig
from mlxgpt.corpus import prepare

def prepared(name):
    data = DataConfig((str(Path(sys.argv[1]) / name),), tokenizer="char")
    prepare.find_or_prepare(data, Path(sys.argv[1]) / "data")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(prepared("small.txt"), prepared("large.txt"))
"""


@pytest.mark.parametrize("separator", ["", END_OF_TEXT])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, separator: str) -> None:
    unit = "To be or not to be, that is the question. " * 1000
    for name, megabytes in (("small.txt", 15), ("large.txt", 60)):
        texts = [f"{n}{unit}" for n in range(megabytes * 1_000_000 // len(unit))]
        (tmp_path / name).write_text(separator.join(texts))
    line = [sys.executable, "-c", MEMORY, str(tmp_path)]
    out = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    small, large = (int(n) * (1 if sys.platform == "darwin" else 1024) for n in out.split())
    # To have read it all would take 45 MB more at the very least, and 360 MB more as int64.
    assert large - small < 30_000_000
