from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlxgpt import api
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.holdout import hold_out_from_train
from mlxgpt.utils.errors import UserError

Prepare = Callable[..., Dataset]


@pytest.fixture
def prepared(home: Path) -> Prepare:
    def prepared(text: str, tokenizer: str, **given: object) -> Dataset:
        (home / "my.txt").write_text(text, encoding="utf-8")
        name = f"my-{tokenizer}-{'-'.join(map(str, given.values()))}"
        return api.prepare("my.txt", tokenizer=tokenizer, name=name, **given)  # type: ignore[arg-type]

    return prepared


def stories(count: int) -> str:
    return "<|endoftext|>".join(f"Once there were {n} mice, and no cat." * 3 for n in range(count))


def texts(dataset: Dataset) -> list[str]:
    return [dataset.tokenizer.decode(tokens.ids) for tokens in (dataset.train, dataset.val)]


def test_a_text_of_characters_gives_its_end(prepared: Prepare, text: str) -> None:
    whole = prepared(text, "char")
    part = hold_out_from_train(whole)
    train, held = texts(part)
    assert train + held == texts(whole)[0]
    assert part.meta.val.bytes == len(held.encode())
    assert part.meta.train.bytes == len(train.encode())
    assert part.meta.train.bytes + part.meta.val.bytes == whole.meta.train.bytes
    assert 0.09 < part.meta.val.bytes / whole.meta.train.bytes <= 0.1


@pytest.mark.parametrize("vocab_size", [257, 300, 350])
def test_documents_are_held_back_whole_whatever_the_tokenizer(
    prepared: Prepare, vocab_size: int
) -> None:
    whole = prepared(stories(100), "bpe", vocab_size=vocab_size)
    part = hold_out_from_train(whole)
    train, held = texts(part)
    assert train + held == texts(whole)[0]
    assert train.endswith("<|endoftext|>")
    assert held.startswith("Once there were")
    assert (part.meta.val.documents, part.meta.val.bytes) == (9, held_bytes(held))
    assert part.meta.train.documents + 9 == whole.meta.train.documents
    assert part.meta.val.tokens == len(part.val.ids)


def held_bytes(text: str) -> int:
    return len(text.replace("<|endoftext|>", "").encode())


def test_of_one_long_document_the_end_of_it_is_held_back(prepared: Prepare, text: str) -> None:
    whole = prepared(text, "bpe", vocab_size=280)
    part = hold_out_from_train(whole)
    train, held = texts(part)
    assert train + held == texts(whole)[0]
    assert 0.08 < part.meta.val.bytes / whole.meta.train.bytes <= 0.1


def test_of_a_large_text_no_more_than_a_megabyte(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxgpt.data.holdout.MAX_HOLDOUT_BYTES", 500)
    part = hold_out_from_train(prepared(stories(100), "bpe", vocab_size=300))
    assert 300 < part.meta.val.bytes <= 500
    assert part.meta.val.documents == 4


def test_the_data_is_another_than_the_whole_and_the_same_each_time(
    prepared: Prepare, text: str
) -> None:
    whole = prepared(text, "char")
    part = hold_out_from_train(whole)
    assert part.meta.fingerprint != whole.meta.fingerprint
    assert part.meta.fingerprint == hold_out_from_train(whole).meta.fingerprint
    assert np.array_equal(part.train.ids, whole.train.ids[: len(part.train.ids)])


def test_a_text_too_short_is_refused(prepared: Prepare) -> None:
    with pytest.raises(UserError, match="too little training text to hold a part of it back"):
        hold_out_from_train(prepared("abcdefghijklmn", "char"))
