"""The interface of all tokenizers, their added tokens, and functions that work on any tokenizer.

A tokenizer converts text to ids and back; it knows nothing of files, models or training. As text,
tokenizer.json, it is in Hugging Face's format, so that `tokenizers` and `transformers` read it too.
Its fingerprint goes into the token arrays, the run and every checkpoint made with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

END_OF_TEXT = "<|endoftext|>"
NUL = "\0"  # ends a document in a stream of documents; no text contains it


@dataclass(frozen=True)
class AddedToken:
    """A token that is neither a character nor made by merges.

    Attributes:
        special: the token marks a place, such as the end of a text. Its content in a text is text
            like any other, and never becomes the token. Not special: the content always does.
    """

    id: int
    content: str
    special: bool = True


END_OF_TEXT_KEY = "end_of_text"  # key of an added token in our tokenizer.json


class AddedTokens:
    """The added tokens of a vocabulary, in the order of their ids.

    Raises:
        ValueError: if one is empty, or two have the same content.
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
        """ids[n] of a text: of the added tokens in it that are not special, and what `encode`
        returns for the text between them.
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
        """Mark the special tokens in a text, for `encode_with_special_tokens`."""
        if self._special_pattern is None:
            return text
        return self._special_pattern.sub(lambda match: f"{NUL}{self.ids[match[0]]}{NUL}", text)

    def fingerprint_fields(self, end_of_text: int | None) -> list[Any]:
        """The added tokens, as part of what a tokenizer's fingerprint is computed from."""
        return [[[t.id, t.content, t.special] for t in self.tokens], end_of_text]

    def to_tree(self, end_of_text: int | None) -> list[dict[str, Any]]:
        """The `added_tokens` of a tokenizer.json. `tokenizers` ignores the key that marks an
        end-of-text of another name than GPT-2's.
        """
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tree = []
        for token in self.tokens:
            fields = {"id": token.id, "content": token.content, "special": token.special}
            is_custom_end = token.id == end_of_text and token.content != END_OF_TEXT
            tree.append({**fields, **flags, **({END_OF_TEXT_KEY: True} if is_custom_end else {})})
        return tree


def _compile_alternatives(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that matches any of the texts, the longest first; None if there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def tokens_by_id(pairs: Iterable[tuple[int, bytes]]) -> list[bytes]:
    """The bytes of every id, from 0 on.

    Raises:
        ValueError: if an id is missing, or has two tokens.
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
    """Text <-> ids, all below `vocab_size`."""

    added_tokens: AddedTokens

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a document; None where there are no documents."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end-of-text token included."""

    @property
    def fingerprint(self) -> str:
        """The sha256 of everything that decides which ids a text becomes."""

    def encode(self, text: str) -> np.ndarray:
        """ids[n], int64. Special text in it is text, never a token."""

    def encode_documents(self, text: str) -> np.ndarray:
        """As `encode`; each NUL becomes an end-of-text token."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; special tokens are written by their names."""

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes that one id stands for; those of one character may be spread over
        several ids.
        """

    def to_json(self) -> str:
        """tokenizer.json."""


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """[vocab_size]: how many bytes of text each id stands for; an end-of-text for none."""
    lengths = np.array([len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)])
    if tokenizer.end_of_text is not None:
        lengths[tokenizer.end_of_text] = 0
    return lengths


def end_of_text_token(tokenizer: Tokenizer) -> str | None:
    """The name of the end-of-text, such as <|endoftext|>; None where there is none."""
    end_id = tokenizer.end_of_text
    return None if end_id is None else tokenizer.token_bytes(end_id).decode()


def encode_with_special_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text with special tokens that `AddedTokens.mark_special_tokens` marked.

    Raises:
        ValueError: if it has other NULs.
    """
    ids: list[int] = []
    for n, piece in enumerate(text.split(NUL)):
        ids += [int(piece)] if n % 2 else tokenizer.encode(piece).tolist()
    return ids


def build_bpe_json(
    added_tokens: list[dict[str, Any]], *, pre_tokenizer: Any, decoder: Any, **model: Any
) -> str:
    """The tokenizer.json of a BPE: the arguments, and the fields that are the same in all."""
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
