"""Text <-> ids. A tokenizer knows nothing of files of data, models or training.

Its file, tokenizer.json, is in Hugging Face's format, so that `tokenizers` and `transformers`
read it too. Its fingerprint goes into the arrays, the run and every checkpoint made with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"


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
        special = [
            {
                "id": self.end_of_text,
                "content": END_OF_TEXT,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ]
        tree: dict[str, Any] = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special if self.end_of_text is not None else [],
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": {c: i for i, c in enumerate(self.characters)},
                "merges": [],
            },
        }
        return json.dumps(tree, ensure_ascii=False, indent=1)


# With byte-level BPE this becomes the two tokenizers' common protocol.
Tokenizer = CharTokenizer


def load(path: Path) -> Tokenizer:
    """Read a tokenizer.json that `to_json` wrote.

    Raises:
        UserError: if there is none, or it is not one of ours.
    """
    try:
        return _from_tree(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", "copy the whole folder, or make it again."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a tokenizer of mlxgpt: {error}", "restore it, or make it again."
        ) from error


def _from_tree(tree: Any) -> Tokenizer:
    vocab = tree["model"]["vocab"]
    tokenizer = CharTokenizer(vocab, end_of_text=bool(tree["added_tokens"]))
    if tree["model"]["merges"] or json.loads(tokenizer.to_json()) != tree:
        raise ValueError("it describes another kind of tokenizer")
    return tokenizer


def _code_points(text: str) -> np.ndarray:
    # surrogatepass: a lone surrogate can reach us from the command line, and is then named as
    # unknown like any other character.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
