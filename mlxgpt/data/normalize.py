"""Normalizes text: line ends, byte-order mark, Unicode form.

All text is normalized here before it is encoded: documents, prompts, texts to evaluate.
"""

from __future__ import annotations

import unicodedata

import numpy as np

from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.utils.errors import UserError

BOM = "\ufeff"


def normalize_text(text: str) -> str:
    """Drop a leading byte-order mark, and turn CRLF and lone CR into LF."""
    text = text.removeprefix(BOM)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def normalize_prompt(text: str, tokenizer: Tokenizer) -> str:
    """A prompt as a model reads it: normalized, and in the Unicode form that its tokenizer knows.

    Raises:
        UserError: for bytes that are not UTF-8, which Python passes on as lone surrogates.
    """
    text = normalize_text(text)
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        is_byte = 0xDC80 <= code <= 0xDCFF
        description = f"the byte 0x{code - 0xDC00:02x}" if is_byte else f"U+{code:04X}"
        raise UserError(
            f"the text is not valid Unicode: character {error.start:,} is {description}",
            "encode the text in UTF-8.",
        ) from error
    return normalize_unicode(text, tokenizer)


def normalize_unicode(text: str, tokenizer: Tokenizer) -> str:
    """A text in the Unicode form that a character tokenizer can encode: unchanged, NFC, or NFD; in
    NFC if it can encode none of them.
    """
    if not isinstance(tokenizer, CharTokenizer) or tokenizer.can_encode(text):
        return text
    nfc = unicodedata.normalize("NFC", text)
    nfd = unicodedata.normalize("NFD", text)
    return nfd if tokenizer.can_encode(nfd) else nfc


def encode_prompt(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """A prompt's ids, int64 [T]; see `normalize_prompt`.

    Raises:
        UserError: if it has characters that the tokenizer lacks.
    """
    return tokenizer.encode(normalize_prompt(text, tokenizer))
