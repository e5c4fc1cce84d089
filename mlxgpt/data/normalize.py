"""Text normalization: line endings, byte-order mark, Unicode form.

All text is normalized here before it is encoded: documents, prompts and evaluation text.
"""

from __future__ import annotations

import unicodedata

import numpy as np

from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.utils.errors import UserError

BOM = "\ufeff"


def normalize_text(text: str) -> str:
    """Drop a leading byte-order mark, and convert CRLF and lone CR to LF."""
    text = text.removeprefix(BOM)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def normalize_prompt(text: str, tokenizer: Tokenizer) -> str:
    """Normalize a prompt, including its Unicode form; see `normalize_unicode`.

    Raises:
        UserError: for bytes that are not UTF-8, which Python represents as lone surrogates.
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
    """Convert text to the Unicode form that a character tokenizer can encode: unchanged, NFC or
    NFD. Returns NFC if it can encode none of them.
    """
    if not isinstance(tokenizer, CharTokenizer) or tokenizer.can_encode(text):
        return text
    nfc = unicodedata.normalize("NFC", text)
    nfd = unicodedata.normalize("NFD", text)
    return nfd if tokenizer.can_encode(nfd) else nfc


def encode_prompt(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Normalize and encode a prompt: ids, int64 [T].

    Raises:
        UserError: for invalid UTF-8, or characters that are not in the vocabulary.
    """
    return tokenizer.encode(normalize_prompt(text, tokenizer))
