"""Text <-> ids: what every tokenizer can do, and the one of characters. A tokenizer knows nothing
of files, models or training.

As text, tokenizer.json, it is in Hugging Face's format, so that `tokenizers` and `transformers`
read it too. Its fingerprint goes into the arrays, the run and every checkpoint made with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from mlxgpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
NUL = "\0"  # in a stream of documents the end of one; no text has it


class Tokenizer(Protocol):
    """Text <-> ids, all below `vocab_size`."""

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

    def encode_stream(self, text: str) -> np.ndarray:
        """As `encode`; each NUL becomes an end-of-text token."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; end-of-text is written as <|endoftext|>."""

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


class CharTokenizer:
    """One token a character (a Unicode code point), ids in code-point order.

    Args:
        characters: the vocabulary, in any order, repeats ignored. It is sorted, never taken in a
            set's order, which differs from process to process.
        end_of_text: whether a last id is added for the end of a document.
    """

    def __init__(self, characters: Iterable[str], *, end_of_text: bool) -> None:
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise UserError("the text has no characters", "give a text that is not empty.")
        self.end_of_text: int | None = len(self.characters) if end_of_text else None
        self._codes = _code_points(self.characters)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end-of-text token included."""
        return len(self.characters) + (self.end_of_text is not None)

    def encode(self, text: str) -> np.ndarray:
        """ids[n], int64, of a text of n characters. Special text in it is text, never a token.

        Raises:
            UserError: naming the characters that are not in the vocabulary.
        """
        codes = _code_points(text)
        ids = np.searchsorted(self._codes, codes)
        known = self._codes[np.minimum(ids, len(self._codes) - 1)] == codes
        if not known.all():
            missing = sorted({chr(c) for c in codes[~known]})
            shown = " ".join(repr(c) for c in missing[:10]) + (" …" if len(missing) > 10 else "")
            raise UserError(
                f"the tokenizer has never seen: {shown}",
                "leave these characters out, or train on a text that has them.",
            )
        return ids

    def encode_stream(self, text: str) -> np.ndarray:
        """As `encode`; each NUL becomes an end-of-text token."""
        if self.end_of_text is None or NUL not in text:
            return self.encode(text)
        ends = _code_points(text) == 0
        ids = np.full(len(ends), self.end_of_text)
        ids[~ends] = self.encode(text.replace(NUL, ""))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; end-of-text is written as <|endoftext|>."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8")

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes that one id stands for."""
        if id == self.end_of_text:
            return END_OF_TEXT.encode()
        return self.characters[id].encode("utf-8")

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of everything that decides which ids a text becomes."""
        identity = json.dumps(["char", self.characters, self.end_of_text is not None])
        return hashlib.sha256(identity.encode()).hexdigest()

    def to_json(self) -> str:
        """tokenizer.json as Hugging Face's `tokenizers` reads it: a BPE without merges, over
        characters, which is what a character tokenizer is.
        """
        return bpe_json(
            self.end_of_text,
            pre_tokenizer=None,
            decoder={"type": "Fuse"},
            vocab={c: i for i, c in enumerate(self.characters)},
            merges=[],
        )


def bpe_json(end_of_text: int | None, *, pre_tokenizer: Any, decoder: Any, **model: Any) -> str:
    """tokenizer.json of a BPE: what all of them have, and what the arguments say."""
    added = []
    if end_of_text is not None:
        token = {"id": end_of_text, "content": END_OF_TEXT, "special": True}
        added = [token | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)]
    tree: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
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
