"""Character tokenizer: one token per Unicode code point."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from mlxgpt.data.tokenizers.base import (
    END_OF_TEXT,
    NUL,
    AddedToken,
    AddedTokens,
    build_bpe_json,
    tokens_by_id,
)
from mlxgpt.utils.errors import UserError


class CharTokenizer:
    """Tokenizer with one token per character (Unicode code point), and ids in code-point order.
    `from_ids` makes one with ids in any order.

    Args:
        characters: the vocabulary, in any order, duplicates allowed.
        end_of_text: whether to add an end-of-text token, with the last id.

    Attributes:
        characters: the vocabulary in order of its ids.
        end_of_text: id of the end-of-text token; None if there is none.
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
        """Make a tokenizer with given ids.

        Args:
            ids: the id of each character, in any order.
            added_tokens: all other tokens.
            end_of_text: id of the added token that ends a document.

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
            raise UserError("the text is empty", "use text that is not empty.")
        self.added_tokens, self.end_of_text = AddedTokens(added_tokens), end_of_text
        pairs = [*ids.items(), *self.added_tokens.ids.items()]
        self._bytes_by_id = tokens_by_id((id, token.encode("utf-8")) for token, id in pairs)
        self.characters = "".join(sorted(ids, key=ids.__getitem__))
        sorted_characters = "".join(sorted(ids))
        self._sorted_codes = _code_points(sorted_characters)
        self._ids_by_code = np.array([ids[character] for character in sorted_characters])
        default_added_tokens = [] if end_of_text is None else [AddedToken(len(ids), END_OF_TEXT)]
        # The ids that `__init__` assigns: their fingerprint and tokenizer.json must not change.
        self._has_default_ids = (
            self._ids_by_code.tolist() == [*range(len(ids))]
            and self.added_tokens.tokens == default_added_tokens
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added tokens."""
        return len(self._bytes_by_id)

    def can_encode(self, text: str) -> bool:
        """Whether every character of a text is in the vocabulary."""
        return set(self.characters).issuperset(text)

    def encode(self, text: str) -> np.ndarray:
        """Encode text: ids, int64 [n]. Special tokens in it are encoded as ordinary text.

        Raises:
            UserError: for characters that are not in the vocabulary.
        """
        return self.added_tokens.encode(text, self._encode)

    def encode_documents(self, text: str) -> np.ndarray:
        """Encode joined documents, like `encode`; each NUL becomes an end-of-text token."""
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
                f"the tokenizer does not know these characters: {preview}",
                "omit these characters, or train on data that contains them.",
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
        """Decode ids to text; special tokens are decoded to their names."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8")

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 bytes of one token."""
        return self._bytes_by_id[id]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that affects how text is encoded."""
        fields: list[Any] = ["char", self.characters, self.end_of_text is not None]
        if not self._has_default_ids:
            fields = ["char", self.characters, sorted(self._ids_by_code.tolist())]
            fields += self.added_tokens.fingerprint_fields(self.end_of_text)
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()

    def to_json(self) -> str:
        """Contents of tokenizer.json for Hugging Face's `tokenizers`: a BPE over characters,
        without merges.
        """
        vocab = dict(
            zip(map(chr, self._sorted_codes.tolist()), self._ids_by_code.tolist(), strict=True)
        )
        if not self._has_default_ids:  # `tokenizers` takes the ids of added tokens from here
            vocab = dict(sorted((vocab | self.added_tokens.ids).items(), key=lambda item: item[1]))
        return build_bpe_json(
            self.added_tokens.to_tree(self.end_of_text),
            pre_tokenizer=None,
            decoder={"type": "Fuse"},
            vocab=vocab,
            merges=[],
        )


def _code_points(text: str) -> np.ndarray:
    # With surrogatepass, a lone surrogate is reported as an unknown character.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
