from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlxgpt.config import DataConfig
from mlxgpt.data import prepare, sources
from mlxgpt.data.dataset import open_dataset
from mlxgpt.data.prepare import find_or_prepare
from mlxgpt.data.prepare_job import PrepareRequest
from mlxgpt.data.readers import DocumentPiece
from mlxgpt.data.sources import Source
from mlxgpt.data.tokenizers.base import END_OF_TEXT
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.utils.errors import UserError
from tests.helpers.preparation import DATASET_FILES, PrepareRecorder, prepare_and_read


def test_arrays_have_nanogpts_format(tmp_path: Path, text_file: Path) -> None:
    dataset = find_or_prepare(PrepareRequest(DataConfig((str(text_file),))), tmp_path / "data")
    raw = np.memmap(dataset.folder / "train.bin", dtype=np.uint16, mode="r")
    text = text_file.read_text(encoding="utf-8")
    assert dataset.tokenizer.decode(raw) == text[: int(len(text) * 0.9)]
    assert {path.name for path in dataset.folder.iterdir()} == DATASET_FILES
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["words"]


def test_large_vocabulary_uses_four_bytes_per_token(tmp_path: Path) -> None:
    text = "".join(chr(n) for n in range(14, 0x12000) if not 0xD800 <= n < 0xE000)
    path = tmp_path / "all.txt"
    path.write_text(text, newline="")
    dataset = find_or_prepare(PrepareRequest(DataConfig((str(path),))), tmp_path)
    assert dataset.meta.dtype == "<u4"
    assert dataset.meta.vocab_size == len(text) > 1 << 16
    assert dataset.tokenizer.decode([*dataset.train.ids, *dataset.val.ids]) == text
    assert dataset.meta.train.tokens * 4 == (dataset.folder / "train.bin").stat().st_size


def test_prepared_dataset_is_not_prepared_again(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = DataConfig((str(text_file),)), tmp_path / "data"
    first = find_or_prepare(PrepareRequest(data), folder)
    monkeypatch.setattr(prepare, "PrepareJob", None)
    assert find_or_prepare(PrepareRequest(data), folder).meta == first.meta
    for name in ("words", str(folder / "words")):  # by name and by folder
        assert find_or_prepare(PrepareRequest(DataConfig((name,))), folder).meta == first.meta


def test_folder_name_includes_the_tokenizer(
    tmp_path: Path, text_file: Path, gpt2: BPETokenizer
) -> None:
    source, vocab_sizes = (str(text_file),), {}
    for kind, vocab_size in (("char", 0), ("bpe", 280), ("bpe", 281), ("gpt2", 0)):
        data = DataConfig(source, tokenizer=kind)
        dataset = find_or_prepare(PrepareRequest(data, vocab_size=vocab_size), tmp_path / "data")
        vocab_sizes[dataset.name] = dataset.meta.vocab_size
        repeated = find_or_prepare(PrepareRequest(data, vocab_size=vocab_size), tmp_path / "data")
        assert repeated.meta == dataset.meta
    sizes = {"words-bpe280": 280, "words-bpe281": 281, "words-gpt2": 50257}
    assert vocab_sizes == {"words": vocab_sizes["words"], **sizes}


def test_default_vocabulary_size_of_a_bpe(
    tmp_path: Path, text_file: Path, notes: list[str]
) -> None:
    data = DataConfig((str(text_file),), tokenizer="bpe")
    dataset = find_or_prepare(PrepareRequest(data), tmp_path / "data")
    assert dataset.name == "words-bpe4096"
    expected = f"the data yields a vocabulary of only {dataset.meta.vocab_size:,} tokens, not 4,096"
    assert expected in notes


def test_strict_refuses_data_that_yields_a_smaller_vocabulary(
    tmp_path: Path, text_file: Path, notes: list[str]
) -> None:
    data, folder = DataConfig((str(text_file),), tokenizer="bpe"), tmp_path / "data"
    with pytest.raises(UserError, match=r"a vocabulary of only \d+ tokens, not 5,000") as excinfo:
        find_or_prepare(PrepareRequest(data, vocab_size=5000, strict=True), folder)
    assert list(folder.iterdir()) == []
    size = int(excinfo.value.remedy.split("--vocab-size ")[1].split(",")[0])
    exact = find_or_prepare(PrepareRequest(data, vocab_size=size, strict=True), folder)
    assert exact.meta.vocab_size == size
    lenient = find_or_prepare(PrepareRequest(data, vocab_size=5000), folder)
    assert lenient.tokenizer.fingerprint == exact.tokenizer.fingerprint
    assert any(f"a vocabulary of only {size} tokens, not 5,000" in line for line in notes)


@pytest.mark.parametrize("vocab_size", [1, 256])
def test_vocabulary_size_that_is_too_small_is_refused_immediately(
    tmp_path: Path, text_file: Path, vocab_size: int
) -> None:
    data = DataConfig((str(text_file),), tokenizer="bpe")
    with pytest.raises(UserError, match="too small for byte-level BPE"):
        find_or_prepare(PrepareRequest(data, vocab_size=vocab_size), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_vocabulary_of_bytes_only_is_accepted(tmp_path: Path, text_file: Path) -> None:
    data = DataConfig((str(text_file),), tokenizer="bpe")
    dataset = find_or_prepare(PrepareRequest(data, vocab_size=257), tmp_path / "data")
    text = text_file.read_bytes()
    assert dataset.meta.vocab_size == 257
    assert dataset.meta.train.tokens + dataset.meta.val.tokens == len(text) + 2


@pytest.mark.parametrize("corpus", ["words.txt", "synthetic"])
@pytest.mark.parametrize("first", ["char", "bpe"])
def test_name_is_refused_if_taken_by_a_dataset_with_another_tokenizer(
    home: Path, text_file: Path, corpus: str, first: str
) -> None:
    megabytes = 0.05 if corpus == "synthetic" else None
    folder = home / "data"

    def prepare_tokenizer(kind: str, vocab_size: int = 280) -> str:
        return find_or_prepare(
            PrepareRequest(
                DataConfig((corpus,), tokenizer=kind),
                vocab_size=vocab_size,
                name="x",
                megabytes=megabytes,
            ),
            folder,
        ).meta.tokenizer

    before = prepare_tokenizer(first)
    other_kind = "bpe" if first == "char" else "char"
    with pytest.raises(UserError, match="from different data or with a different tokenizer"):
        prepare_tokenizer(other_kind)
    assert prepare_tokenizer(first) == before
    if first == "bpe":
        with pytest.raises(UserError, match="with a different tokenizer"):
            prepare_tokenizer("bpe", 281)


def test_name_is_refused_if_taken_by_a_dataset_of_another_source(
    tmp_path: Path, text_file: Path
) -> None:
    data, folder = DataConfig((str(text_file),)), tmp_path / "data"
    before = find_or_prepare(PrepareRequest(data), folder)
    text_file.write_text("Something else altogether.")
    with pytest.raises(UserError, match="was prepared from different data") as excinfo:
        find_or_prepare(PrepareRequest(data), folder)
    assert "--name NAME" in excinfo.value.remedy
    assert open_dataset(before.folder).meta == before.meta
    other = find_or_prepare(PrepareRequest(data, name="other"), folder)
    assert other.folder == folder / "other"


def test_prepared_hub_dataset_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = sources.corpus_origin(["shakespeare"])
    train, val = [DocumentPiece("to be", last=False)], [DocumentPiece("or not", last=False)]
    source = Source("shakespeare", origin, train, val, size=5, single=True)
    monkeypatch.setattr(sources, "open_source", lambda *arguments: source)
    first = find_or_prepare(PrepareRequest(DataConfig()), tmp_path)
    assert first.tokenizer.decode(first.train.ids) == "to be"
    monkeypatch.setattr(sources, "open_source", None)
    assert find_or_prepare(PrepareRequest(DataConfig()), tmp_path).name == "shakespeare"
    with pytest.raises(UserError, match="supported for synthetic only"):
        find_or_prepare(PrepareRequest(DataConfig(), megabytes=3), tmp_path)
    with pytest.raises(UserError, match="has its own validation split"):
        find_or_prepare(PrepareRequest(DataConfig(val_source=("x.txt",))), tmp_path)


def test_prepared_synthetic_stories_are_not_generated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(("synthetic",))
    first = find_or_prepare(PrepareRequest(data, megabytes=0.05), tmp_path)
    monkeypatch.setattr(sources, "open_source", None)
    for megabytes in (None, 0.05):
        assert (
            find_or_prepare(PrepareRequest(data, megabytes=megabytes), tmp_path).meta == first.meta
        )
    with pytest.raises(UserError, match="was prepared from different data"):
        find_or_prepare(PrepareRequest(data, megabytes=0.06), tmp_path)


def test_a_data_folder_named_storybook_with_other_text_is_not_used(home: Path, text: str) -> None:
    """Data folders of `synthetic` were once named `storybook`."""
    (home / "storybook.txt").write_text(text, encoding="utf-8")
    other = find_or_prepare(PrepareRequest(DataConfig(("storybook.txt",))), home / "data")
    request = PrepareRequest(DataConfig(("synthetic",)), megabytes=0.05)
    assert other.name == "storybook"
    assert find_or_prepare(request, home / "data").name == "synthetic"


def test_dataset_with_a_former_folder_name_is_found(home: Path, text: str) -> None:
    """Folder names formerly contained only ASCII letters."""
    for name in ("日本語", "русский", "café"):
        (home / f"{name}.txt").write_text(text, encoding="utf-8")
    former = find_or_prepare(
        PrepareRequest(DataConfig(("日本語.txt",)), name="text"), home / "data"
    )
    (home / "data" / "caf").mkdir()  # unrelated data
    folders = [
        find_or_prepare(PrepareRequest(DataConfig((f"{name}.txt",))), home / "data").folder
        for name in ("日本語", "русский", "café")
    ]
    assert folders == [former.folder, home / "data" / "русский", home / "data" / "café"]


def test_name_in_nfc_and_nfd_is_the_same_dataset(home: Path, text: str) -> None:
    """Some file systems return names in NFD."""
    folders = []
    for name in ("café.txt", "cafe\u0301.txt"):
        (home / name).write_text(text, encoding="utf-8")
        folders.append(find_or_prepare(PrepareRequest(DataConfig((name,))), home / "data").folder)
    assert folders == [home / "data" / "café"] * 2


def test_long_names_leave_room_for_suffixes(home: Path, text: str) -> None:
    source = "語" * 80 + ".txt"
    (home / source).write_text(text, encoding="utf-8")
    folder = find_or_prepare(
        PrepareRequest(DataConfig((source,), tokenizer="bpe")), home / "data"
    ).folder
    assert len(folder.name.encode()) < 200


def test_validation_source_makes_another_dataset(tmp_path: Path, text_file: Path) -> None:
    val = tmp_path / "val.txt"
    val.write_text("to be or not, plain", encoding="utf-8")
    folder = tmp_path / "data"
    find_or_prepare(PrepareRequest(DataConfig((str(text_file),), (str(val),))), folder)
    with pytest.raises(UserError, match="was prepared from different data"):
        find_or_prepare(PrepareRequest(DataConfig((str(text_file),))), folder)


def test_unrelated_folder_is_not_touched(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "data" / "words").mkdir(parents=True)
    (tmp_path / "data" / "words" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="contains no prepared data"):
        find_or_prepare(PrepareRequest(DataConfig((str(text_file),))), tmp_path / "data")
    assert (tmp_path / "data" / "words" / "mine.txt").read_text() == "precious"


def test_progress_is_reported(tmp_path: Path, documents_file: Path) -> None:
    events: list[tuple[str, int, int]] = []

    class ProgressRecorder(PrepareRecorder):
        def progress(self, stage: str, done: int, total: int) -> None:
            events.append((stage, done, total))

    prepare_and_read(documents_file, tmp_path / "data", "bpe", recorder := ProgressRecorder())
    assert recorder.lines == [f"preparing {documents_file} in {tmp_path / 'data' / 'x'}"]
    size = documents_file.stat().st_size
    assert {total for _, _, total in events} == {size}
    for stage in ("reading", "encoding"):
        done = [n for event_stage, n, _ in events if event_stage == stage]
        assert done == sorted(done)
        assert 0.8 * size < done[-1] <= size


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
import numpy, tokenizers
from mlxgpt.config import DataConfig
from mlxgpt.data import prepare

def prepared(name):
    data = DataConfig((str(Path(sys.argv[1]) / name),), tokenizer="char")
    prepare.find_or_prepare(prepare.PrepareRequest(data), Path(sys.argv[1]) / "data")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(prepared("small.txt"), prepared("large.txt"))
"""


@pytest.mark.parametrize("separator", ["", END_OF_TEXT])
def test_memory_does_not_grow_with_the_data(tmp_path: Path, separator: str) -> None:
    unit = "To be or not to be, that is the question. " * 1000
    for name, megabytes in (("small.txt", 15), ("large.txt", 60)):
        texts = [f"{n}{unit}" for n in range(megabytes * 1_000_000 // len(unit))]
        (tmp_path / name).write_text(separator.join(texts))
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    small, large = (int(n) * (1 if sys.platform == "darwin" else 1024) for n in out.split())
    # Reading everything into memory would take at least 45 MB more, or 360 MB as int64.
    assert large - small < 30_000_000
