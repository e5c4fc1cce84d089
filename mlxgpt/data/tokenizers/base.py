"""Tokenizer interface, added tokens, and functions for any tokenizer.

Tokenizers are saved as tokenizer.json in Hugging Face's format, which `tokenizers` and
`transformers` can load. Data folders, runs and checkpoints store the tokenizer's fingerprint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

END_OF_TEXT = "<|endoftext|>"
NUL = "\0"  # end of a document in joined documents; text never contains it


@dataclass(frozen=True)
class AddedToken:
    """A token that is neither a character nor the result of merges.

    Attributes:
        special: whether it is a control token, such as end-of-text. Its content in text is then
            encoded as ordinary text; that of other added tokens is always encoded as the token.
    """

    id: int
    content: str
    special: bool = True


END_OF_TEXT_KEY = "end_of_text"  # marks the end-of-text token in our tokenizer.json


class AddedTokens:
    """The added tokens of a vocabulary, in order of their ids.

    Raises:
        ValueError: if a token is empty, or two have the same content.
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self.tokens = sorted(tokens, key=lambda token: token.id)
        self.ids = {token.content: token.id for token in self.tokens}
        if "" in self.ids or len(self.ids) < len(self.tokens):
            raise ValueError("an added token is empty, or occurs twice")
        self._non_special_pattern = _compile_alternatives(
            token.content for token in self.tokens if not token.special
        )
        self._special_pattern = _compile_alternatives(
            token.content for token in self.tokens if token.special
        )

    def encode(self, text: str, encode: Callable[[str], np.ndarray]) -> np.ndarray:
        """Encode text: ids [n]. Non-special added tokens become their ids; `encode` encodes the
        text between them.
        """
        if self._non_special_pattern is None:
            return encode(text)
        # Every second piece is an added token.
        pieces = enumerate(self._non_special_pattern.split(text))
        return np.concatenate(
            [
                np.array([self.ids[piece]], dtype=np.uint32) if n % 2 else encode(piece)
                for n, piece in pieces
            ]
        )

    def mark_special_tokens(self, text: str) -> str:
        """Mark the special tokens in text, for `encode_with_special_tokens`."""
        if self._special_pattern is None:
            return text
        return self._special_pattern.sub(lambda match: f"{NUL}{self.ids[match[0]]}{NUL}", text)

    def fingerprint_fields(self, end_of_text: int | None) -> list[Any]:
        """The added tokens, as input of a tokenizer's fingerprint."""
        return [[[t.id, t.content, t.special] for t in self.tokens], end_of_text]

    def to_tree(self, end_of_text: int | None) -> list[dict[str, Any]]:
        """The `added_tokens` of a tokenizer.json. An end-of-text token with another name than
        GPT-2's is marked with an extra key, which `tokenizers` ignores.
        """
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tree = []
        for token in self.tokens:
            fields = {"id": token.id, "content": token.content, "special": token.special}
            is_custom_end = token.id == end_of_text and token.content != END_OF_TEXT
            tree.append({**fields, **flags, **({END_OF_TEXT_KEY: True} if is_custom_end else {})})
        return tree


def _compile_alternatives(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Compile a pattern that matches any of the texts, longest first; None if there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def tokens_by_id(pairs: Iterable[tuple[int, bytes]]) -> list[bytes]:
    """The bytes of each token, in order of ids from 0.

    Raises:
        ValueError: if an id is missing or has two tokens.
    """
    tokens: dict[int, bytes] = {}
    for id, token in pairs:
        if type(id) is not int or tokens.setdefault(id, token) != token:
            raise ValueError(f"id {id!r} has two tokens, or is not an integer")
    for id in range(len(tokens)):
        if id not in tokens:
            raise ValueError(f"no token has id {id}")
    return [tokens[id] for id in range(len(tokens))]


class Tokenizer(Protocol):
    """Tokenizer interface: converts text to ids below `vocab_size`, and back."""

    added_tokens: AddedTokens

    @property
    def end_of_text(self) -> int | None:
        """Id of the end-of-text token, which ends a document; None if there is none."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added tokens."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that affects how text is encoded."""

    def encode(self, text: str) -> np.ndarray:
        """Encode text: ids, int64 [n]. Special tokens in it are encoded as ordinary text."""

    def encode_documents(self, text: str) -> np.ndarray:
        """Encode joined documents, like `encode`; each NUL becomes an end-of-text token."""

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text; special tokens are decoded to their names."""

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 bytes of one token; a character may span several tokens."""

    def to_json(self) -> str:
        """Contents of tokenizer.json."""


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text per token, [vocab_size]; 0 for end-of-text."""
    lengths = np.array([len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)])
    if tokenizer.end_of_text is not None:
        lengths[tokenizer.end_of_text] = 0
    return lengths


def end_of_text_token(tokenizer: Tokenizer) -> str | None:
    """Name of the end-of-text token, such as <|endoftext|>; None if there is none."""
    end_id = tokenizer.end_of_text
    return None if end_id is None else tokenizer.token_bytes(end_id).decode()


def encode_with_special_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode text whose special tokens were marked by `AddedTokens.mark_special_tokens`.

    Raises:
        ValueError: if the text contains other NULs.
    """
    ids: list[int] = []
    for n, piece in enumerate(text.split(NUL)):
        ids += [int(piece)] if n % 2 else tokenizer.encode(piece).tolist()
    return ids


def build_bpe_json(
    added_tokens: list[dict[str, Any]], *, pre_tokenizer: Any, decoder: Any, **model: Any
) -> str:
    """Build the tokenizer.json of a BPE from the fields that differ between tokenizers."""
    tree: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            **model,
        },
    }
    return json.dumps(tree, ensure_ascii=False)
