"""Arrays as nanoGPT's prepare.py writes them, created with tiktoken only."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxgpt import api
from mlxgpt.config import DataConfig
from mlxgpt.data import token_array as arrays
from mlxgpt.data.dataset import open_dataset
from mlxgpt.data.prepare import find_or_prepare
from mlxgpt.data.prepare_job import PrepareRequest
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.storage import run as runs
from mlxgpt.utils.errors import UserError
from tests.helpers.preparation import read_folder_files
from tests.helpers.texts import decode_splits

TEXTS = {
    "train": ["The rain in Spain.\n", "Grüße, 日本語 🙂", "not <|endoftext|> the end"],
    "val": ["To be, or not to be"],
}


@pytest.fixture
def folder(gpt2: BPETokenizer, tmp_path: Path) -> Path:
    import tiktoken

    encoding: Any = tiktoken.get_encoding("gpt2")
    folder = tmp_path / "data" / "web"
    folder.mkdir(parents=True)
    for split, texts in TEXTS.items():
        ids = [i for text in texts for i in [*encoding.encode_ordinary(text), encoding.eot_token]]
        np.array(ids, dtype=np.uint16).tofile(folder / f"{split}.bin")
    return folder


def test_nanogpt_arrays_are_opened_unchanged(folder: Path, gpt2: BPETokenizer) -> None:
    before = read_folder_files(folder)
    dataset = open_dataset(folder)
    assert decode_splits(dataset) == (TEXTS["train"], TEXTS["val"])
    for split, meta in (("train", dataset.meta.train), ("val", dataset.meta.val)):
        assert meta.documents == len(TEXTS[split])
        assert meta.bytes == sum(len(text.encode()) for text in TEXTS[split])
        assert meta.tokens == len(before[f"{split}.bin"]) // 2
    assert dataset.meta.vocab_size == 50257
    assert dataset.meta.tokenizer == dataset.tokenizer.fingerprint == gpt2.fingerprint
    assert read_folder_files(folder) == before


def test_nanogpt_dataset_is_found_by_name_and_by_folder(folder: Path) -> None:
    expected = open_dataset(folder).meta
    for name in ("web", str(folder)):
        assert find_or_prepare(PrepareRequest(DataConfig((name,))), folder.parent).meta == expected


def test_counts_do_not_depend_on_the_read_block_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_dataset(folder).meta
    monkeypatch.setattr(arrays, "READ_BLOCK_BYTES", 14)
    assert open_dataset(folder, verify=True).meta == expected


def test_fingerprint_depends_on_the_arrays(folder: Path) -> None:
    before = open_dataset(folder).meta.fingerprint
    np.array([1, 2, 3], dtype=np.uint16).tofile(folder / "val.bin")
    assert open_dataset(folder).meta.fingerprint != before


def test_id_outside_the_gpt2_vocabulary_is_refused(folder: Path) -> None:
    np.array([1, 50256], dtype=np.uint16).tofile(folder / "train.bin")
    open_dataset(folder)
    np.array([1, 50257, 2], dtype=np.uint16).tofile(folder / "val.bin")
    with pytest.raises(UserError, match=r"val\.bin contains id 50257, but GPT-2 has 50,257"):
        open_dataset(folder)


LINES = "To be, or not to be:\nthat is the question.\nGrüße, 日本 🙂\n"


def write_characters(folder: Path, text: str, alphabet: str | None = None) -> None:
    """Write the files that nanoGPT's data/shakespeare_char/prepare.py makes from a text."""
    alphabet = alphabet or "".join(sorted(set(text)))
    stoi = {character: id for id, character in enumerate(alphabet)}
    cut = int(len(text) * 0.9)
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        np.array([stoi[c] for c in part], dtype=np.uint16).tofile(folder / f"{split}.bin")
    meta = {"vocab_size": len(alphabet), "itos": dict(enumerate(alphabet)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


@pytest.fixture
def characters(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "shakespeare_char"
    folder.mkdir(parents=True)
    write_characters(folder, LINES)
    return folder


def test_nanogpt_char_arrays_are_opened_unchanged(characters: Path) -> None:
    before = read_folder_files(characters)
    dataset = open_dataset(characters)
    cut = int(len(LINES) * 0.9)
    for part, tokens, meta in (
        (LINES[:cut], dataset.train, dataset.meta.train),
        (LINES[cut:], dataset.val, dataset.meta.val),
    ):
        assert dataset.tokenizer.decode(int(id) for id in tokens.ids) == part
        assert tokens.ids.tolist() == dataset.tokenizer.encode(part).tolist()
        assert tokens.vocab_size == len(set(LINES))
        assert (meta.tokens, meta.documents, meta.bytes) == (len(part), 1, len(part.encode()))
    assert dataset.tokenizer.end_of_text is None
    assert dataset.meta.vocab_size == dataset.tokenizer.vocab_size == len(set(LINES))
    assert dataset.meta.tokenizer == dataset.tokenizer.fingerprint
    assert read_folder_files(characters) == before


def test_nanogpt_shakespeare_char_equals_mlxgpts_dataset(shakespeare: Path, tmp_path: Path) -> None:
    """Same split and same ids, so the same dataset."""
    nanogpt_folder = tmp_path / "shakespeare_char"
    nanogpt_folder.mkdir()
    write_characters(nanogpt_folder, shakespeare.read_text(encoding="utf-8"))
    prepared = find_or_prepare(PrepareRequest(DataConfig((str(shakespeare),))), tmp_path / "data")
    dataset = open_dataset(nanogpt_folder)
    assert dataset.meta.fingerprint == prepared.meta.fingerprint
    assert (dataset.meta.train, dataset.meta.val) == (prepared.meta.train, prepared.meta.val)
    assert (dataset.meta.train.tokens, dataset.meta.val.tokens) == (1_003_854, 111_540)


@pytest.mark.usefixtures("no_check")
def test_training_on_nanogpt_char_arrays(
    home: Path, characters: Path, train: Any, text: str
) -> None:
    write_characters(characters, text)
    assert train("chars", source=characters, max_steps=4).step == 4
    run = runs.open_run(home / "runs" / "chars")
    assert run.config.model.vocab_size == len(set(text))
    assert api.generate(run="chars", max_tokens=5, prompt="to").tokens == 5
    assert api.evaluate(run="chars").tokens == len(text) - int(len(text) * 0.9) - 1


def test_id_outside_the_char_vocabulary_is_refused(characters: Path) -> None:
    size = len(set(LINES))
    np.array([1, size - 1], dtype=np.uint16).tofile(characters / "val.bin")
    open_dataset(characters)
    np.array([1, size, 2], dtype=np.uint16).tofile(characters / "val.bin")
    with pytest.raises(UserError, match=rf"val\.bin contains id {size}, but meta\.pkl has {size}"):
        open_dataset(characters)


def test_characters_in_another_order_keep_their_ids(characters: Path) -> None:
    write_characters(characters, "abcabc" * 9, "acb")
    dataset = open_dataset(characters)
    assert dataset.tokenizer.encode("abc").tolist() == dataset.train.ids[:3].tolist() == [0, 2, 1]
    assert dataset.tokenizer.decode(dataset.val.ids.tolist()) in "abcabc" * 9
    fingerprint = open_dataset(characters).meta.fingerprint
    write_characters(characters, "abcabc" * 9)
    assert open_dataset(characters).meta.fingerprint != fingerprint


@pytest.mark.parametrize("kind", ["pickle", "pipe", "link to nothing"])
def test_invalid_meta_pkl_is_refused(folder: Path, kind: str) -> None:
    path = folder / "meta.pkl"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"vocab_size": 65}))
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"meta\.pkl is not a (character vocabulary|file)"):
        open_dataset(folder)


@pytest.mark.parametrize("content", [None, b"", b"odd"])
@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_incomplete_array_is_refused(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
        problem = rf"{name} is truncated or empty"
    else:  # without train.bin the folder is not recognized as nanoGPT's
        problem = "has no val.bin" if name == "val.bin" else "contains no prepared data"
    with pytest.raises(UserError, match=problem):
        open_dataset(folder)


def test_mlxgpt_arrays_without_meta_json_are_not_taken_for_nanogpts(
    folder: Path, gpt2: BPETokenizer
) -> None:
    (folder / "tokenizer.json").write_text(gpt2.to_json(), encoding="utf-8")
    with pytest.raises(UserError, match="contains no prepared data"):
        open_dataset(folder)
