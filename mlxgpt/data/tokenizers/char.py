"""Text <-> ids: what every tokenizer can do, and the one of characters. A tokenizer knows nothing
of files, models or training.

As text, tokenizer.json, it is in Hugging Face's format, so that `tokenizers` and `transformers`
read it too. Its fingerprint goes into the arrays, the run and every checkpoint made with it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from mlxgpt.utils.errors import UserError

END_OF_TEXT = "<|endoftext|>"
NUL = "\0"  # in a stream of documents the end of one; no text has it
END_OF_TEXT_KEY = "end_of_text"  # key of an added token in our tokenizer.json


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
        """ids[n] of a text: those of the added tokens in it that are not special, and what `encode`
        makes of the rest.
        """
        if self._non_special_pattern is None:
            return encode(text)
        pieces = enumerate(
            self._non_special_pattern.split(text)
        )  # every second one is an added token
        return np.concatenate(
            [
                np.array([self.ids[piece]], dtype=np.uint32) if n % 2 else encode(piece)
                for n, piece in pieces
            ]
        )

    def mark_special_tokens(self, text: str) -> str:
        """A text with the names of special tokens marked: `encode_marked` makes tokens of them."""
        if self._special_pattern is None:
            return text
        return self._special_pattern.sub(lambda match: f"{NUL}{self.ids[match[0]]}{NUL}", text)

    def fingerprint_fields(self, end_of_text: int | None) -> list[Any]:
        """What a fingerprint has to cover."""
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
    """What matches each of some texts, the longest first; None if there are none."""
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
            raise ValueError(f"id {id!r} has two tokens, or is not a whole number")
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
    """The ids of a text with special tokens that `AddedTokens.marked` has marked.

    Raises:
        ValueError: if there are other marks in it.
    """
    ids: list[int] = []
    for n, piece in enumerate(text.split(NUL)):
        ids += [int(piece)] if n % 2 else tokenizer.encode(piece).tolist()
    return ids


class CharTokenizer:
    """One token a character (a Unicode code point), ids in code-point order. `from_ids` makes one
    with ids in any order.

    Args:
        characters: the vocabulary, in any order, repeats ignored. It is sorted, never taken in a
            set's order, which differs from process to process.
        end_of_text: whether a last id is added for the end of a document.

    Attributes:
        characters: the vocabulary in the order of its ids.
        end_of_text: the id that ends a document; None where there are no documents.
        added_tokens: the tokens that are not characters.
    """

    def __init__(self, characters: Iterable[str], *, end_of_text: bool) -> None:
        sorted_characters = sorted(set(characters))
        end_id = len(sorted_characters) if end_of_text else None
        added_tokens = [] if end_id is None else [AddedToken(end_id, END_OF_TEXT)]
        self._init_vocab(
            {character: id for id, character in enumerate(sorted_characters)}, added_tokens, end_id
        )

    @classmethod
    def from_ids(
        cls,
        ids: Mapping[str, int],
        added_tokens: Sequence[AddedToken] = (),
        end_of_text: int | None = None,
    ) -> CharTokenizer:
        """The tokenizer with these ids.

        Args:
            ids: the id of each character, in any order.
            added_tokens: all other tokens.
            end_of_text: the id of the added token that ends a document.

        Raises:
            ValueError: if an id is missing or has two tokens, or a token is not one character.
        """
        if any(len(character) != 1 for character in ids):
            raise ValueError("a token is not a single character")
        tokenizer = cls.__new__(cls)
        tokenizer._init_vocab(ids, added_tokens, end_of_text)
        return tokenizer

    def _init_vocab(
        self, ids: Mapping[str, int], added_tokens: Sequence[AddedToken], end_of_text: int | None
    ) -> None:
        if not ids:
            raise UserError("the text has no characters", "give a text that is not empty.")
        self.added_tokens, self.end_of_text = AddedTokens(added_tokens), end_of_text
        pairs = [*ids.items(), *self.added_tokens.ids.items()]
        self._bytes_by_id = tokens_by_id((id, token.encode("utf-8")) for token, id in pairs)
        self.characters = "".join(sorted(ids, key=ids.__getitem__))
        sorted_characters = "".join(sorted(ids))
        self._sorted_codes = _code_points(sorted_characters)
        self._ids_by_code = np.array([ids[character] for character in sorted_characters])
        default_added_tokens = [] if end_of_text is None else [AddedToken(len(ids), END_OF_TEXT)]
        # As `__init__` makes it. The fingerprint and file of such a tokenizer never change.
        self._has_default_ids = (
            self._ids_by_code.tolist() == [*range(len(ids))]
            and self.added_tokens.tokens == default_added_tokens
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, the added tokens included."""
        return len(self._bytes_by_id)

    def can_encode(self, text: str) -> bool:
        """Whether every character of a text is in the vocabulary."""
        return set(self.characters).issuperset(text)

    def encode(self, text: str) -> np.ndarray:
        """ids[n], int64, of a text. Special text in it is text, never a token.

        Raises:
            UserError: naming the characters that are not in the vocabulary.
        """
        return self.added_tokens.encode(text, self._encode)

    def encode_documents(self, text: str) -> np.ndarray:
        """As `encode`; each NUL becomes an end-of-text token."""
        return self.added_tokens.encode(text, self._encode_documents)

    def _encode(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        indices = np.minimum(
            np.searchsorted(self._sorted_codes, codes), len(self._sorted_codes) - 1
        )
        is_known = self._sorted_codes[indices] == codes
        if not is_known.all():
            missing = sorted({chr(c) for c in codes[~is_known]})
            preview = " ".join(repr(c) for c in missing[:10]) + (" …" if len(missing) > 10 else "")
            raise UserError(
                f"the tokenizer has never seen: {preview}",
                "leave these characters out, or train on a text that has them.",
            )
        return self._ids_by_code[indices]

    def _encode_documents(self, text: str) -> np.ndarray:
        if self.end_of_text is None or NUL not in text:
            return self._encode(text)
        is_end = _code_points(text) == 0
        ids = np.full(len(is_end), self.end_of_text)
        ids[~is_end] = self._encode(text.replace(NUL, ""))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; special tokens are written by their names."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8")

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes that one id stands for."""
        return self._bytes_by_id[id]

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of everything that decides which ids a text becomes."""
        fields: list[Any] = ["char", self.characters, self.end_of_text is not None]
        if not self._has_default_ids:
            ids = [
                self._ids_by_code[np.searchsorted(self._sorted_codes, ord(c))]
                for c in self.characters
            ]
            fields = ["char", self.characters, list(map(int, ids))]
            fields += self.added_tokens.fingerprint_fields(self.end_of_text)
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()

    def to_json(self) -> str:
        """tokenizer.json as Hugging Face's `tokenizers` reads it: a BPE without merges, over
        characters, which is what a character tokenizer is.
        """
        vocab = dict(
            zip(map(chr, self._sorted_codes.tolist()), self._ids_by_code.tolist(), strict=True)
        )
        if not self._has_default_ids:  # by which `tokenizers` knows the ids of added tokens
            vocab = dict(sorted((vocab | self.added_tokens.ids).items(), key=lambda item: item[1]))
        return build_bpe_json(
            self.added_tokens.to_tree(self.end_of_text),
            pre_tokenizer=None,
            decoder={"type": "Fuse"},
            vocab=vocab,
            merges=[],
        )


def build_bpe_json(
    added_tokens: list[dict[str, Any]], *, pre_tokenizer: Any, decoder: Any, **model: Any
) -> str:
    """tokenizer.json of a BPE: what all of them have, and what the arguments say."""
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


def _code_points(text: str) -> np.ndarray:
    # surrogatepass: a lone surrogate can reach us from the command line, and is then named as
    # unknown like any other character.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
