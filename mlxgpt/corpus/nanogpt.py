"""nanoGPT's token arrays: a folder with train.bin and val.bin, uint16 ids of GPT-2's encoding, and
nothing that describes them; or of characters, with the vocabulary in meta.pkl.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mlxgpt import files
from mlxgpt.corpus import bpe, meta_pickle
from mlxgpt.corpus.bpe import BPETokenizer
from mlxgpt.corpus.meta import FORMAT, SPLITS, Meta, SplitMeta
from mlxgpt.corpus.tokenizer import CharTokenizer
from mlxgpt.corpus.tokens import Tokens
from mlxgpt.errors import UserError

CHUNK = 1 << 24  # ids at a time
VOCABULARY = "meta.pkl"


def open_arrays(folder: Path) -> tuple[Meta, BPETokenizer | CharTokenizer, Tokens, Tokens]:
    """Open such a folder: its tokenizer, its arrays, and what our meta.json would say of them,
    which is counted.

    Raises:
        UserError: if meta.pkl is no vocabulary of characters, an array is missing, or holds an id
            that the tokenizer has not.
    """
    tokenizer = _tokenizer(folder)
    sizes = np.array([len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)])
    if tokenizer.end_of_text is not None:
        sizes[tokenizer.end_of_text] = 0
    arrays, counts = [], []
    for split in SPLITS:
        path = folder / f"{split}.bin"
        ids = _map(path)
        counts.append(_count(path, ids, tokenizer, sizes))
        arrays.append(Tokens(ids, tokenizer.vocab_size))
    origin = {"nanogpt": folder.name}
    meta = Meta(FORMAT, "<u2", tokenizer.vocab_size, tokenizer.fingerprint, origin, *counts)
    train, val = arrays
    return meta, tokenizer, train, val


def _tokenizer(folder: Path) -> BPETokenizer | CharTokenizer:
    path = folder / VOCABULARY
    if not os.path.lexists(path):  # a link to nothing is there, and refused
        return bpe.gpt2()
    characters = meta_pickle.characters(path)
    tokenizer = CharTokenizer(characters, end_of_text=False)
    if tokenizer.characters != characters:
        raise UserError(
            f"{path} has its characters in another order than that of their code points",
            "sort them as nanoGPT's prepare.py does, or prepare the text itself: --source FILE.",
        )
    return tokenizer


def _map(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}", "nanoGPT's prepare.py writes both.")
    if path.stat().st_size % 2 or not path.stat().st_size:
        raise UserError(f"{path} is cut short or empty", "write it again.")
    return np.memmap(path, dtype="<u2", mode="r")


def _count(
    path: Path, ids: np.ndarray, tokenizer: BPETokenizer | CharTokenizer, sizes: np.ndarray
) -> SplitMeta:
    """What meta.json would say of one array, each of its ids checked.

    Args:
        sizes: bytes of text of each id.
    """
    ends = size = 0
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        if (most := int(chunk.max())) >= tokenizer.vocab_size:
            raise _unknown(path, most, tokenizer)
        ends += int((chunk == tokenizer.end_of_text).sum()) if tokenizer.end_of_text else 0
        size += int(sizes[chunk].sum())
    documents = ends if tokenizer.end_of_text else 1  # without an end, all of it is one
    return SplitMeta(len(ids), documents, size, files.sha256(path))


def _unknown(path: Path, id: int, tokenizer: BPETokenizer | CharTokenizer) -> UserError:
    if isinstance(tokenizer, CharTokenizer):
        return UserError(
            f"{path} holds id {id}, and {VOCABULARY} has {tokenizer.vocab_size:,}",
            "they are not of one preparation: let nanoGPT's prepare.py write both again.",
        )
    return UserError(
        f"{path} holds id {id}, and GPT-2 has {tokenizer.vocab_size:,}",
        "these are not GPT-2's ids: prepare the text itself, --source FILE.",
    )
