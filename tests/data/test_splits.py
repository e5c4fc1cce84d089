"""Test which documents are used for training and which for validation, in the token arrays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.config import DataConfig
from mlxgpt.data import readers, splits, tokenize
from mlxgpt.data.dataset import Dataset, open_dataset
from mlxgpt.data.hub import HUB_DATASETS
from mlxgpt.data.prepare import find_or_prepare
from mlxgpt.data.prepare_job import PrepareRequest
from mlxgpt.data.readers import DocumentPiece
from mlxgpt.data.sources import Source
from mlxgpt.data.splits import SplitRule, drop_blank_documents
from mlxgpt.data.tokenizers.base import END_OF_TEXT
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.utils.errors import UserError
from tests.helpers.texts import decode_splits, join_pieces, read_like_python, remove_nul, texts

Folders = pytest.TempPathFactory
tokenizers = st.sampled_from(["char", "bpe"])
stories = [f"Story number {n} of many." for n in range(2000)]


def prepare_documents(
    folder: Path,
    train: str | Sequence[str],
    val: str | Sequence[str] | None = None,
    tokenizer: str = "char",
    vocab_size: int = 260,
) -> Dataset:
    """Prepare a text file (`str`) or JSON rows (sequence) as a dataset."""
    (folder / "texts").mkdir()
    paths: list[tuple[str, ...]] = []
    for side, content in (("train", train), ("val", val)):
        if content is None:
            paths.append(())
        elif isinstance(content, str):
            path = folder / "texts" / f"{side}.txt"
            path.write_bytes(content.encode())
            paths.append((str(path),))
        else:
            path = folder / "texts" / f"{side}.jsonl"
            path.write_text("\n".join(json.dumps({"text": text}) for text in content))
            paths.append((str(path),))
    data = DataConfig(paths[0], paths[1], tokenizer)
    return find_or_prepare(PrepareRequest(data, vocab_size=vocab_size, name="x"), folder / "data")


def normalize_documents(texts: Sequence[str]) -> list[str]:
    """Return the documents as trained on: not blank, without surrounding newlines."""
    return [text.strip("\n") for text in map(read_like_python, texts) if text.strip()]


document_lists = st.lists(
    st.one_of(texts, st.sampled_from(["", " \n", "\nx y\r\n", "x y"])), max_size=6
)
nul_free_documents = document_lists.map(lambda texts: [remove_nul(text) for text in texts])


@given(nul_free_documents, tokenizers)
def test_each_document_is_in_one_split_and_decodes_unchanged(
    tmp_path_factory: Folders, documents: list[str], tokenizer: str
) -> None:
    expected = normalize_documents(documents)
    if len(set(expected)) < 2 or len(set("".join(expected))) < 2:
        return  # nothing to split or to learn
    with mock.patch.object(splits, "MAX_VAL_FRACTION", 1.0):
        dataset = prepare_documents(tmp_path_factory.mktemp("t"), documents, tokenizer=tokenizer)
    train, val = decode_splits(dataset)
    assert not set(train) & set(val), "no validation document is trained on"
    assert train == [text for text in expected if text in train], "in order, with repetitions"
    assert val == [text for text in expected if text not in train]
    check_counts(dataset)


@given(nul_free_documents, tokenizers)
def test_each_document_is_cut_if_whole_ones_are_too_large_for_validation(
    tmp_path_factory: Folders, documents: list[str], tokenizer: str
) -> None:
    expected = [text for text in normalize_documents(documents) if text]
    if len(set(expected)) < 2 or max(map(len, expected)) < 2 or len(set("".join(expected))) < 2:
        return
    with mock.patch.object(splits, "MAX_VAL_FRACTION", 0.0):
        dataset = prepare_documents(tmp_path_factory.mktemp("t"), documents, tokenizer=tokenizer)
    cuts = [int(len(text) * 0.9) or len(text) for text in expected]
    train = [text[:cut] for text, cut in zip(expected, cuts, strict=True)]
    val = [text[cut:] for text, cut in zip(expected, cuts, strict=True) if text[cut:]]
    assert decode_splits(dataset) == (train, val)
    check_counts(dataset)


def test_two_documents_of_unequal_size_are_both_cut(tmp_path: Path, notes: list[str]) -> None:
    """With the rule for many documents, the book would be the whole validation split."""
    book, preface = "It was a dark night. " * 5000, "To the reader: " + "welcome. " * 100
    for name, text in (("book", book), ("preface", preface)):
        (tmp_path / f"{name}.txt").write_text(text)
    data = DataConfig((str(tmp_path),), (), "char")
    dataset = find_or_prepare(PrepareRequest(data, name="x"), tmp_path / "data")
    assert dataset.meta.val.bytes / (dataset.meta.val.bytes + dataset.meta.train.bytes) < 0.11
    train, val = decode_splits(dataset)
    assert [a + b for a, b in zip(train, val, strict=True)] == [book, preface]
    assert [len(text) for text in train] == [int(len(text) * 0.9) for text in (book, preface)]
    assert [note for note in notes if "the last tenth of each document" in note]


def test_documents_of_many_pieces_are_cut_at_nine_tenths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsplit = prepare_documents(
        tmp_path, documents := ["\n" + "x yz ä " * n + "\r\n" for n in (90, 1, 33, 90)]
    )
    assert len(decode_splits(unsplit)[1]) == 4, "one of each document"
    monkeypatch.setattr(readers, "MAX_PIECE_CHARS", 16)
    monkeypatch.setattr(tokenize, "CHUNK_CHARS", 20)
    (tmp_path / "again").mkdir()
    assert decode_splits(prepare_documents(tmp_path / "again", documents)) == decode_splits(unsplit)


def test_bpe_is_trained_on_the_training_part_of_each_document(tmp_path: Path) -> None:
    dataset = prepare_documents(
        tmp_path, ["abc " * 90 + "zqzq " * 7, "abd " * 90 + "zqzq " * 7], None, "bpe", 262
    )
    assert isinstance(dataset.tokenizer, BPETokenizer)
    assert not any(b"q" in token for token in dataset.tokenizer.tokens[256:])
    assert any(b"ab" in token for token in dataset.tokenizer.tokens[256:])


@pytest.mark.parametrize(
    ("train", "val", "hashes"),
    [
        (stories, None, ("8432f089731feade", "b43dbd5ce8b7143f")),
        ("ab c\n" * 500, None, ("d5888287f470f715", "7baa4f6b414ca7e1")),
        ([text * 9 for text in stories[:300]], None, ("c7111b6fc7924e86", "712d04cd7b994311")),
        (stories[:50], stories[40:45], ("0332225e48afc3ec", "3de68f48508b9942")),
        (["ä" * 70 + str(n) for n in range(500)], None, ("d407835785cc2276", "d82d81e7a1db716a")),
    ],
)
def test_splits_of_other_sources_stay_bit_identical(
    tmp_path: Path, train: str | list[str], val: list[str] | None, hashes: tuple[str, str]
) -> None:
    """Hashes from before documents could be cut; published results depend on them."""
    meta = prepare_documents(tmp_path, train, val).meta
    assert (meta.train.sha256[:16], meta.val.sha256[:16]) == hashes


@given(nul_free_documents, nul_free_documents, tokenizers)
def test_validation_documents_are_not_trained_on(
    tmp_path_factory: Folders, documents: list[str], val_documents: list[str], tokenizer: str
) -> None:
    expected, val = normalize_documents(documents), normalize_documents(val_documents)
    trained_on = [text for text in expected if text not in val]
    if (
        not trained_on
        or not val
        or len(expected) == len(val) == 1
        or len({*"".join(expected + val)}) < 2
    ):
        return
    dataset = prepare_documents(tmp_path_factory.mktemp("t"), documents, val_documents, tokenizer)
    assert decode_splits(dataset) == (trained_on, val)
    check_counts(dataset)


def check_counts(dataset: Dataset) -> None:
    for side, tokens, meta in zip(
        decode_splits(dataset),
        (dataset.train, dataset.val),
        (dataset.meta.train, dataset.meta.val),
        strict=True,
    ):
        assert meta.documents == len(side)
        assert meta.bytes == sum(len(text.encode()) for text in side)
        assert meta.tokens == len(tokens.ids)
        assert meta.tokens == sum(len(dataset.tokenizer.encode(text)) + 1 for text in side)


@given(texts.map(remove_nul), tokenizers)
def test_single_document_is_cut_at_nine_tenths(
    tmp_path_factory: Folders, text: str, tokenizer: str
) -> None:
    """As in nanoGPT: after int(0.9 n) characters, with nothing in between."""
    raw_text, text = text, read_like_python(text)
    if not text.strip() or len(set(text)) < 2:
        return
    dataset = prepare_documents(tmp_path_factory.mktemp("t"), raw_text, tokenizer=tokenizer)
    cut = int(len(text) * 0.9)
    assert decode_halves(dataset) == (text[:cut], text[cut:])
    assert dataset.meta.train.bytes == len(text[:cut].encode())
    assert dataset.meta.val.bytes == len(text[cut:].encode())
    assert dataset.meta.train.documents == dataset.meta.val.documents == 1


def decode_halves(dataset: Dataset) -> tuple[str, str]:
    """Return both splits of a single document, without a final end-of-text."""
    if dataset.tokenizer.end_of_text is not None:
        (train,), (val,) = decode_splits(dataset)
        return train, val
    decode = dataset.tokenizer.decode
    return decode(dataset.train.ids), decode(dataset.val.ids)


@pytest.mark.parametrize("where", [0, 1, 9, 10, 11, 89, 90, 91])
def test_cut_does_not_depend_on_pieces(
    tmp_path: Path, where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_PIECE_CHARS", 16)
    monkeypatch.setattr(tokenize, "CHUNK_CHARS", 20)
    text = "x" * where + " " + "yz ä" * 30
    dataset = prepare_documents(tmp_path, text)
    cut = int(len(text) * 0.9)
    assert dataset.tokenizer.decode(dataset.train.ids) == text[:cut]
    assert dataset.tokenizer.decode(dataset.val.ids) == text[cut:]
    assert dataset.meta.train.documents == dataset.meta.val.documents == 1


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_documents_of_many_pieces_stay_whole(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsplit = prepare_documents(
        tmp_path, documents := ["\n" + text * 9 + "\r\n" for text in stories[:300]]
    )
    expected = decode_splits(unsplit)
    monkeypatch.setattr(readers, "MAX_PIECE_CHARS", 60)  # the stories differ within half of that
    monkeypatch.setattr(tokenize, "CHUNK_CHARS", 100)
    (tmp_path / "again").mkdir()
    dataset = prepare_documents(tmp_path / "again", documents, tokenizer=tokenizer)
    train, val = decode_splits(dataset)
    assert sorted(train + val) == sorted(expected[0] + expected[1])
    assert val
    check_counts(dataset)


def test_duplicates_are_in_the_same_split_in_any_order(tmp_path: Path) -> None:
    # The first 500 stories occur twice, with different newlines around them.
    text = f"\n{END_OF_TEXT}\r\n".join([*stories, ""]) + END_OF_TEXT.join(stories[:500])
    train, val = decode_splits(prepare_documents(tmp_path, text))
    assert set(train) | set(val) == set(stories), "newlines around stories are stripped"
    assert not set(train) & set(val)
    assert len(train) + len(val) == 2500
    assert 5 <= len(set(val)) <= 45, "about one in a hundred"
    (tmp_path / "r").mkdir()
    assert set(decode_splits(prepare_documents(tmp_path / "r", stories[::-1]))[1]) == set(val)


def test_long_duplicates_are_recognized_despite_surrounding_newlines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newlines shift where a long document is first cut into pieces."""
    monkeypatch.setattr(readers, "MAX_PIECE_CHARS", 200)
    unit = "a bc def ghij klmno " * 30
    for length in (100, 101, *range(180, 220), 600):
        long_document = (unit * (length // len(unit) + 1))[:length]
        folder = tmp_path / str(length)
        folder.mkdir()
        text = END_OF_TEXT.join(
            [
                long_document,
                "another",
                "\n\n" + long_document,
                "\n" + long_document + "\n",
                long_document + "\n",
            ]
        )
        assert decode_splits(
            prepare_documents(folder, text, "\r\n" + long_document + f"\n{END_OF_TEXT}no")
        )[0] == ["another"]


def test_two_documents_are_both_cut(tmp_path: Path) -> None:
    assert decode_splits(prepare_documents(tmp_path, ["text 1", "text 2"])) == (
        ["text ", "text "],
        ["1", "2"],
    )


def test_two_single_documents_have_no_end_of_text(tmp_path: Path) -> None:
    dataset = prepare_documents(tmp_path, "ab\n", "c\n")
    assert dataset.tokenizer.end_of_text is None
    assert dataset.tokenizer.vocab_size == 4, "letters of both sides"
    assert dataset.tokenizer.decode(dataset.train.ids) == "ab\n"
    assert dataset.tokenizer.decode(dataset.val.ids) == "c\n"


def test_blank_documents_do_not_count(tmp_path: Path) -> None:
    dataset = prepare_documents(
        tmp_path, f"\n{END_OF_TEXT}the only text\n{END_OF_TEXT} \n{END_OF_TEXT}"
    )
    text = "the only text\n"
    assert dataset.tokenizer.decode([*dataset.train.ids, *dataset.val.ids]) == text


@pytest.mark.parametrize(
    ("train", "val", "problem"),
    [
        ("", None, "no text found in"),
        (f" \n{END_OF_TEXT}\n", None, "no text found in"),
        ("one two", " \n", "no text found in"),
        (["same", "same", "\nsame\n"], None, "all documents are identical"),
        (["one", "two\n"], ["two", "one"], "every training document is also in the validation"),
        ("one\n", "one", "every training document is also in the validation"),
        ("aaaa", None, "consists only of the character 'a'"),
        (["a", "aa"], None, "consists only of the character 'a'"),
    ],
)
def test_data_with_nothing_to_train_or_validate_on_is_refused(
    tmp_path: Path, train: str | list[str], val: str | list[str] | None, problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        prepare_documents(tmp_path, train, val)
    assert list((tmp_path / "data").iterdir()) == []


def test_single_character_is_too_short_to_be_cut(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the (val|train) split is empty"):
        prepare_documents(tmp_path, "a", tokenizer="bpe")


def test_large_dataset_has_a_smaller_validation_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [f"Story number {n} of very many." for n in range(10_000)]
    val_documents = decode_splits(prepare_documents(tmp_path, documents))[1]
    size = (tmp_path / "texts" / "train.jsonl").stat().st_size
    monkeypatch.setattr(splits, "MAX_VAL_BYTES", size // 500)
    (tmp_path / "large").mkdir()
    fewer_val_documents = decode_splits(prepare_documents(tmp_path / "large", documents))[1]
    assert 60 < len(val_documents) < 140, "one in a hundred"
    assert 4 < len(fewer_val_documents) < 40, "one in five hundred"


def test_bpe_is_trained_only_on_the_training_split(tmp_path: Path) -> None:
    train = [f"abc {n}" for n in range(9)] + ["zqzqzq"] * 50
    dataset = prepare_documents(tmp_path, train, ["zqzqzq", "abc"], "bpe", 300)
    assert isinstance(dataset.tokenizer, BPETokenizer)
    assert not any(b"z" in token for token in dataset.tokenizer.tokens[256:])
    assert any(b"ab" in token for token in dataset.tokenizer.tokens[256:])


def test_bpe_is_trained_on_a_sample_of_a_homogeneous_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(splits, "BPE_SAMPLE_CHARS", 1000)
    progress_chars = []

    def record_progress(done: int) -> None:
        progress_chars.append(done)

    pieces, val_pieces = list(map(DocumentPiece, stories)), [DocumentPiece("one")]
    for is_homogeneous in (False, True):
        progress_chars.clear()
        source = Source("x", {}, pieces, val_pieces, size=1000, is_homogeneous=is_homogeneous)
        splits.scan_source(source, "bpe300", record_progress)
        assert (progress_chars[-1] < 1100) == is_homogeneous, (
            "else all is read, to find every error"
        )


def test_drop_blank_documents_with_many_or_one_document() -> None:
    pieces = [
        DocumentPiece("a", last=False),
        DocumentPiece(" "),
        DocumentPiece("\n"),
        DocumentPiece("b"),
        DocumentPiece(""),
    ]
    assert join_pieces(drop_blank_documents(pieces)) == ["a ", "b"]
    assert join_pieces(drop_blank_documents(pieces, single=True)) == ["a b"]
    assert list(drop_blank_documents([], single=True)) == []


def test_split_rule_json_round_trip() -> None:
    for rule in (
        SplitRule(single=True, cut=7),
        SplitRule(single=False, every=100, chosen="ff"),
        SplitRule(single=False, tails=True),
    ):
        assert SplitRule(**json.loads(json.dumps(asdict(rule)))) == rule


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_real_shakespeare_is_split_as_in_nanogpt(
    tmp_path: Path, shakespeare: Path, tokenizer: str, gpt2: BPETokenizer
) -> None:
    dataset = find_or_prepare(
        PrepareRequest(DataConfig((str(shakespeare),), (), tokenizer)), tmp_path
    )
    text = shakespeare.read_text()
    cut = int(len(text) * 0.9)
    assert (cut, len(text) - cut) == (1_003_854, 111_540)
    assert decode_halves(dataset) == (text[:cut], text[cut:])
    assert dataset.meta.origin["sha256"] == HUB_DATASETS["shakespeare"].sha256
    if tokenizer == "char":
        assert (dataset.meta.train.tokens, dataset.meta.val.tokens) == (1_003_854, 111_540)
        assert dataset.meta.vocab_size == 65
        assert dataset.tokenizer.end_of_text is None
    else:  # counts printed by nanoGPT's data/shakespeare/prepare.py, plus an end-of-text each
        assert (dataset.meta.train.tokens, dataset.meta.val.tokens) == (301_966 + 1, 36_059 + 1)
        assert open_dataset(dataset.folder).meta == dataset.meta


def test_real_validation_stories_are_not_trained_on(tmp_path: Path, real_texts: Path) -> None:
    train, val = (str(real_texts / "tinystories" / f"{name}.txt") for name in ("train", "valid"))
    data = DataConfig((train,), (val,), "bpe")
    dataset = find_or_prepare(PrepareRequest(data, vocab_size=1024), tmp_path)
    training, validation = decode_splits(dataset)
    texts = [
        normalize_documents(Path(name).read_text().split(END_OF_TEXT)) for name in (train, val)
    ]
    assert validation == texts[1]
    assert training == [text for text in texts[0] if text not in set(validation)]
    assert dataset.meta.vocab_size == 1024
    assert dataset.meta.train.bytes / dataset.meta.train.tokens > 3


def test_real_parquet_rows_are_stories(tmp_path: Path, real_texts: Path) -> None:
    import pyarrow.parquet

    path = real_texts / "tinystories" / "train-00000-of-00001.parquet"
    dataset = find_or_prepare(PrepareRequest(DataConfig((str(path),))), tmp_path)
    rows = pyarrow.parquet.read_table(path)["text"].to_pylist()
    train, val = decode_splits(dataset)
    assert sorted(train + val) == sorted(normalize_documents(rows))
