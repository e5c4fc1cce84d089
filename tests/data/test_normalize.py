from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.data.normalize import encode_prompt, normalize_prompt, normalize_text
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.utils.errors import UserError
from tests.helpers.texts import read_like_python, texts

NFC, NFD = "éclair", unicodedata.normalize("NFD", "éclair")
LINES = st.lists(st.sampled_from(["a", "\r", "\n", "\r\n", "\ufeff", "\u2028", "\x85", "\v", "\f"]))


@given(st.one_of(texts, LINES.map("".join)))
def test_text_is_normalized_like_python_text_files(text: str) -> None:
    assert normalize_text(text) == read_like_python(text)


@given(texts)
def test_bpe_prompt_is_normalized_before_encoding(small_bpe: BPETokenizer, text: str) -> None:
    assert (
        encode_prompt(text, small_bpe).tolist() == small_bpe.encode(read_like_python(text)).tolist()
    )


@pytest.mark.parametrize(("known", "prompt"), [(NFD, NFC), (NFC, NFD), (NFC, NFC), (NFD, NFD)])
def test_prompt_is_converted_to_the_unicode_form_of_the_tokenizer(known: str, prompt: str) -> None:
    tokenizer = CharTokenizer(known, end_of_text=False)
    assert tokenizer.decode(encode_prompt(prompt, tokenizer)) == known


def test_prompt_of_known_characters_is_unchanged() -> None:
    """Also if the tokenizer knows both forms."""
    tokenizer = CharTokenizer(NFC + NFD, end_of_text=False)
    for prompt in (NFC, NFD, NFC + NFD):
        assert normalize_prompt(prompt, tokenizer) == prompt


@pytest.mark.parametrize("prompt", ["ö", "o\u0308"])
def test_unknown_characters_are_shown_in_composed_form(prompt: str) -> None:
    with pytest.raises(UserError, match="does not know these characters: 'ö'"):
        encode_prompt(prompt, CharTokenizer(NFD, end_of_text=False))


@pytest.mark.parametrize(
    ("prompt", "place"),
    [("caf\udce9", "character 3 is the byte 0xe9"), ("\ud800", "character 0 is U\\+D800")],
)
def test_prompt_with_invalid_unicode_is_refused(
    small_bpe: BPETokenizer, prompt: str, place: str
) -> None:
    for tokenizer in (small_bpe, CharTokenizer("caf", end_of_text=False)):
        with pytest.raises(UserError, match=place):
            encode_prompt(prompt, tokenizer)
