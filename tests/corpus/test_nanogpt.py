"""Arrays as nanoGPT's prepare.py writes them, written here with tiktoken alone."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxgpt.config import DataConfig
from mlxgpt.corpus import nanogpt
from mlxgpt.corpus.bpe import BPETokenizer
from mlxgpt.corpus.dataset import open_dataset
from mlxgpt.corpus.prepare import find_or_prepare
from mlxgpt.errors import UserError
from tests.corpus.texts import sides

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


def test_its_arrays_are_opened_as_they_are(folder: Path, gpt2: BPETokenizer) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    dataset = open_dataset(folder)
    assert sides(dataset) == (TEXTS["train"], TEXTS["val"])
    for split, meta in (("train", dataset.meta.train), ("val", dataset.meta.val)):
        assert meta.documents == len(TEXTS[split])
        assert meta.bytes == sum(len(text.encode()) for text in TEXTS[split])
        assert meta.tokens == len(before[f"{split}.bin"]) // 2
    assert dataset.meta.vocab_size == 50257
    assert dataset.meta.tokenizer == dataset.tokenizer.fingerprint == gpt2.fingerprint
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_it_is_found_by_its_name_and_by_its_folder(folder: Path) -> None:
    expected = open_dataset(folder).meta
    for name in ("web", str(folder)):
        assert find_or_prepare(DataConfig((name,)), folder.parent).meta == expected


def test_counts_do_not_hang_on_how_much_is_read_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_dataset(folder).meta
    monkeypatch.setattr(nanogpt, "CHUNK", 7)
    assert open_dataset(folder).meta == expected


def test_other_arrays_are_other_data(folder: Path) -> None:
    before = open_dataset(folder).meta.fingerprint
    np.array([1, 2, 3], dtype=np.uint16).tofile(folder / "val.bin")
    assert open_dataset(folder).meta.fingerprint != before


def test_an_id_that_gpt2_has_not_is_refused(folder: Path) -> None:
    np.array([1, 50256], dtype=np.uint16).tofile(folder / "train.bin")
    open_dataset(folder)
    np.array([1, 50257, 2], dtype=np.uint16).tofile(folder / "val.bin")
    with pytest.raises(UserError, match=r"val\.bin holds id 50257, and GPT-2 has 50,257"):
        open_dataset(folder)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65}))
    with pytest.raises(UserError, match=r"meta\.pkl: its ids are not GPT-2's"):
        open_dataset(folder)


@pytest.mark.parametrize("content", [None, b"", b"odd"])
@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_an_array_that_is_not_whole_is_refused(
    folder: Path, name: str, content: bytes | None
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
        problem = rf"{name} is cut short or empty"
    else:  # without train.bin, nothing says that it is nanoGPT's
        problem = "has no val.bin" if name == "val.bin" else "holds no prepared data"
    with pytest.raises(UserError, match=problem):
        open_dataset(folder)


def test_our_own_arrays_without_their_meta_json_are_not_taken_for_them(
    folder: Path, gpt2: BPETokenizer
) -> None:
    (folder / "tokenizer.json").write_text(gpt2.to_json(), encoding="utf-8")
    with pytest.raises(UserError, match="holds no prepared data"):
        open_dataset(folder)
