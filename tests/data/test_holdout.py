from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlxgpt import api
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.holdout import hold_out_from_train
from mlxgpt.utils.errors import UserError

PrepareText = Callable[..., Dataset]


@pytest.fixture
def prepare_text(home: Path) -> PrepareText:
    def prepare(text: str, tokenizer: str, **options: object) -> Dataset:
        (home / "my.txt").write_text(text, encoding="utf-8")
        name = f"my-{tokenizer}-{'-'.join(map(str, options.values()))}"
        return api.prepare("my.txt", tokenizer=tokenizer, name=name, **options)  # type: ignore[arg-type]

    return prepare


def make_stories(count: int) -> str:
    return "<|endoftext|>".join(f"Once there were {n} mice, and no cat." * 3 for n in range(count))


def decode_both_splits(dataset: Dataset) -> list[str]:
    return [dataset.tokenizer.decode(tokens.ids) for tokens in (dataset.train, dataset.val)]


def test_end_of_a_char_dataset_is_held_out(prepare_text: PrepareText, text: str) -> None:
    full = prepare_text(text, "char")
    reduced = hold_out_from_train(full)
    train, held_out = decode_both_splits(reduced)
    assert train + held_out == decode_both_splits(full)[0]
    assert reduced.meta.val.bytes == len(held_out.encode())
    assert reduced.meta.train.bytes == len(train.encode())
    assert reduced.meta.train.bytes + reduced.meta.val.bytes == full.meta.train.bytes
    assert 0.09 < reduced.meta.val.bytes / full.meta.train.bytes <= 0.1


@pytest.mark.parametrize("vocab_size", [257, 300, 350])
def test_whole_documents_are_held_out(prepare_text: PrepareText, vocab_size: int) -> None:
    full = prepare_text(make_stories(100), "bpe", vocab_size=vocab_size)
    reduced = hold_out_from_train(full)
    train, held_out = decode_both_splits(reduced)
    assert train + held_out == decode_both_splits(full)[0]
    assert train.endswith("<|endoftext|>")
    assert held_out.startswith("Once there were")
    assert (reduced.meta.val.documents, reduced.meta.val.bytes) == (
        9,
        count_document_bytes(held_out),
    )
    assert reduced.meta.train.documents + 9 == full.meta.train.documents
    assert reduced.meta.val.tokens == len(reduced.val.ids)


def count_document_bytes(text: str) -> int:
    return len(text.replace("<|endoftext|>", "").encode())


def test_end_of_a_single_long_document_is_held_out(prepare_text: PrepareText, text: str) -> None:
    full = prepare_text(text, "bpe", vocab_size=280)
    reduced = hold_out_from_train(full)
    train, held_out = decode_both_splits(reduced)
    assert train + held_out == decode_both_splits(full)[0]
    assert 0.08 < reduced.meta.val.bytes / full.meta.train.bytes <= 0.1


def test_held_out_part_has_a_maximum_size(
    prepare_text: PrepareText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxgpt.data.holdout.MAX_HOLDOUT_BYTES", 500)
    reduced = hold_out_from_train(prepare_text(make_stories(100), "bpe", vocab_size=300))
    assert 300 < reduced.meta.val.bytes <= 500
    assert reduced.meta.val.documents == 4


def test_held_out_dataset_has_its_own_reproducible_fingerprint(
    prepare_text: PrepareText, text: str
) -> None:
    full = prepare_text(text, "char")
    reduced = hold_out_from_train(full)
    assert reduced.meta.fingerprint != full.meta.fingerprint
    assert reduced.meta.fingerprint == hold_out_from_train(full).meta.fingerprint
    assert np.array_equal(reduced.train.ids, full.train.ids[: len(reduced.train.ids)])


def test_dataset_that_is_too_short_is_refused(prepare_text: PrepareText) -> None:
    with pytest.raises(UserError, match="too little training data for a held-out part"):
        hold_out_from_train(prepare_text("abcdefghijklmn", "char"))
