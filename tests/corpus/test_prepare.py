from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlxgpt.config import DataConfig
from mlxgpt.corpus import prepare, sources
from mlxgpt.corpus.prepare import find_or_prepare, write_dataset
from mlxgpt.corpus.sources import Source
from mlxgpt.corpus.tokenizer import CharTokenizer
from mlxgpt.errors import UserError

documents = st.lists(st.text(min_size=1), min_size=1, max_size=5)


@given(documents, documents)
def test_arrays_decode_to_the_documents_with_one_end_of_text_after_each(
    tmp_path_factory: pytest.TempPathFactory, train: list[str], val: list[str]
) -> None:
    assume(len(set("".join(train + val))) > 1)
    folder = tmp_path_factory.mktemp("data") / "x"
    dataset = write_dataset(Source("x", {}, train, val, single=False), folder)
    for tokens, texts, meta in (
        (dataset.train, train, dataset.meta.train),
        (dataset.val, val, dataset.meta.val),
    ):
        ends = np.flatnonzero(tokens.ids == dataset.tokenizer.end_of_text)
        parts = np.split(tokens.ids, ends + 1)[:-1]
        assert [dataset.tokenizer.decode(part[:-1]) for part in parts] == texts
        assert meta.tokens == len(tokens.ids)
        assert meta.bytes == sum(len(text.encode()) for text in texts)
        assert meta.documents == len(texts)


def test_a_single_document_has_no_end_of_text(tmp_path: Path) -> None:
    dataset = write_dataset(Source("x", {}, ["ab\n"], ["c\n"], single=True), tmp_path / "x")
    assert dataset.tokenizer.end_of_text is None
    assert dataset.tokenizer.characters == "\nabc", "from both sides"
    assert dataset.tokenizer.decode(dataset.train.ids) == "ab\n"


def test_arrays_are_what_nanogpt_reads(tmp_path: Path, text_file: Path) -> None:
    dataset = find_or_prepare(DataConfig((str(text_file),)), tmp_path / "data")
    raw = np.memmap(dataset.folder / "train.bin", dtype=np.uint16, mode="r")
    text = text_file.read_text()
    assert dataset.tokenizer.decode(raw) == text[: int(len(text) * 0.9)]
    assert {p.name for p in dataset.folder.iterdir()} == {
        "train.bin",
        "val.bin",
        "meta.json",
        "tokenizer.json",
    }


def test_what_is_prepared_is_not_prepared_again(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = DataConfig((str(text_file),)), tmp_path / "data"
    first = find_or_prepare(data, folder)
    monkeypatch.setattr(prepare, "write_dataset", None)
    assert find_or_prepare(data, folder).meta == first.meta
    for name in ("words", str(folder / "words")):  # by its name, and by its folder
        assert find_or_prepare(DataConfig((name,)), folder).meta == first.meta


def test_another_text_does_not_take_a_name_that_is_taken(tmp_path: Path, text_file: Path) -> None:
    data, folder = DataConfig((str(text_file),)), tmp_path / "data"
    before = find_or_prepare(data, folder)
    text_file.write_text("Something else altogether.")
    with pytest.raises(UserError, match="was prepared from another text") as caught:
        find_or_prepare(data, folder)
    assert "--name NAME" in caught.value.remedy
    assert prepare.open_dataset(before.folder).meta == before.meta
    other = find_or_prepare(data, folder, name="other")
    assert other.folder == folder / "other"


def test_a_corpus_of_the_hub_that_is_here_needs_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = sources.corpus_origin("shakespeare")
    source = Source("shakespeare", origin, ["to be"], ["or not"], single=True)
    write_dataset(source, tmp_path / "shakespeare")
    monkeypatch.setattr(sources, "open_source", None)
    assert find_or_prepare(DataConfig(), tmp_path).name == "shakespeare"
    with pytest.raises(UserError, match="only the storybook"):
        find_or_prepare(DataConfig(), tmp_path, megabytes=3)
    with pytest.raises(UserError, match="has its own validation text"):
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


def test_a_failure_halfway_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def encode(self: CharTokenizer, text: str) -> np.ndarray:
        calls.append(text)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return np.zeros(len(text), dtype=np.int64)

    monkeypatch.setattr(CharTokenizer, "encode", encode)
    with pytest.raises(UserError, match="No space left on device"):
        write_dataset(Source("x", {}, ["one", "two"], ["three"], single=False), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "data" / "words").mkdir(parents=True)
    (tmp_path / "data" / "words" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds no prepared data"):
        find_or_prepare(DataConfig((str(text_file),)), tmp_path / "data")
    assert (tmp_path / "data" / "words" / "mine.txt").read_text() == "precious"
