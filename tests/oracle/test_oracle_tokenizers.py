"""Tokenizers give the same ids in transformers, for the same folders. Needs the extra `oracle`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from mlxgpt.convert import tokenizers
from mlxgpt.data.tokenizers.base import AddedToken
from mlxgpt.data.tokenizers.char import CharTokenizer
from tests.helpers.tokenizer_folders import (
    ADDED_TOKENS,
    TEXTS_WITH_ADDED_TOKENS,
    TOKENIZER_LAYOUTS,
    write_folder,
)

pytest.importorskip("transformers", reason="the extra `oracle` is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # third-party warnings
    from transformers import AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # third-party warnings


@pytest.mark.parametrize("end", [None, 0])
def test_transformers_reads_characters_in_any_order(tmp_path: Path, end: int | None) -> None:
    letters = "the ca\nÄ🙂"
    ids = {letter: n for n, letter in enumerate(letters, int(end == 0))}
    added = [] if end is None else [AddedToken(end, "</s>")]
    tokenizer = CharTokenizer.from_ids(ids, added, end)
    tokenizers.write_hf_tokenizer(tmp_path, tokenizer, 16, add_bos_token=end == 0)
    hf_tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    text = "the cat\nÄt 🙂"
    assert hf_tokenizer(text, add_special_tokens=False)["input_ids"] == [ids[c] for c in text]
    assert tokenizer.encode(text).tolist() == [ids[c] for c in text]
    assert hf_tokenizer(text)["input_ids"] == [
        *([] if end is None else [0]),
        *tokenizer.encode(text),
    ]
    assert hf_tokenizer.decode(tokenizer.encode(text)) == text
    assert list(hf_tokenizer(text)) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("form", TOKENIZER_LAYOUTS)
def test_ids_match_transformers(tmp_path: Path, form: str) -> None:
    """We encode special tokens in a text as text, like transformers' `split_special_tokens`."""
    write_folder(tmp_path, form)
    tokenizer, _ = tokenizers.read_hf_tokenizer(tmp_path, 1000)
    hf_tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    for id, (content, special) in enumerate(ADDED_TOKENS, 280):
        assert hf_tokenizer.convert_tokens_to_ids(content) == id
        assert tokenizer.decode([id]) == hf_tokenizer.decode([id]) == content
        assert {token.id: token.special for token in tokenizer.added_tokens.tokens}[id] == special
    assert hf_tokenizer.eos_token_id == tokenizer.end_of_text
    tokenizers.write_hf_tokenizer(tmp_path, tokenizer, 16, add_bos_token=False)
    exported_tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)

    @settings(max_examples=100, deadline=None)
    @given(TEXTS_WITH_ADDED_TOKENS)
    def check(text: str) -> None:
        expected = hf_tokenizer(text)["input_ids"]
        assert tokenizer.encode(text).tolist() == expected
        assert exported_tokenizer(text)["input_ids"] == expected

    check()
