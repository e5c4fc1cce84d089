"""transformers loads the same folders, with the same ids. Needs the extra `oracle`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from mlxgpt.convert import tokenizers
from mlxgpt.data.tokenizers.base import AddedToken
from mlxgpt.data.tokenizers.char import CharTokenizer
from tests.helpers.tokenizer_folders import ADDED, FOLDERS, PIECES, write_folder

pytest.importorskip("transformers", reason="the extra `oracle` is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's
    from transformers import AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's


@pytest.mark.parametrize("end", [None, 0])
def test_transformers_reads_characters_in_another_order(tmp_path: Path, end: int | None) -> None:
    letters = "the ca\nÄ🙂"
    ids = {letter: n for n, letter in enumerate(letters, int(end == 0))}
    added = [] if end is None else [AddedToken(end, "</s>")]
    ours = CharTokenizer.from_ids(ids, added, end)
    tokenizers.write_hf_tokenizer(tmp_path, ours, 16, add_bos_token=end == 0)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path)
    text = "the cat\nÄt 🙂"
    assert theirs(text, add_special_tokens=False)["input_ids"] == [ids[c] for c in text]
    assert ours.encode(text).tolist() == [ids[c] for c in text]
    assert theirs(text)["input_ids"] == [*([] if end is None else [0]), *ours.encode(text)]
    assert theirs.decode(ours.encode(text)) == text
    assert list(theirs(text)) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("form", FOLDERS)
def test_transformers_reads_the_same_ids(tmp_path: Path, form: str) -> None:
    """Special tokens in a text are text here, which is its `split_special_tokens`."""
    write_folder(tmp_path, form)
    ours, _ = tokenizers.read_hf_tokenizer(tmp_path, 1000)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    for id, (content, special) in enumerate(ADDED, 280):
        assert theirs.convert_tokens_to_ids(content) == id
        assert ours.decode([id]) == theirs.decode([id]) == content
        assert {token.id: token.special for token in ours.added_tokens.tokens}[id] == special
    assert theirs.eos_token_id == ours.end_of_text
    tokenizers.write_hf_tokenizer(tmp_path, ours, 16, add_bos_token=False)
    exported: Any = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)

    @settings(max_examples=100, deadline=None)
    @given(PIECES)
    def check(text: str) -> None:
        expected = theirs(text)["input_ids"]
        assert ours.encode(text).tolist() == expected
        assert exported(text)["input_ids"] == expected

    check()
