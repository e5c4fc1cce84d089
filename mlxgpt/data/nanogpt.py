"""nanoGPT's token arrays: a folder with train.bin and val.bin, uint16 ids of GPT-2's encoding, and
nothing that describes them; or of characters, with the vocabulary in meta.pkl.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.data import meta_pickle
from mlxgpt.data.hash_cache import Verified
from mlxgpt.data.meta import FORMAT, SPLITS, Meta, SplitMeta
from mlxgpt.data.token_array import Tokens, read_whole
from mlxgpt.data.tokenizers import bpe
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer, byte_lengths
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

DTYPE = "<u2"
VOCABULARY = "meta.pkl"


def open_arrays(
    folder: Path, verified: Verified
) -> tuple[Meta, BPETokenizer | CharTokenizer, Tokens, Tokens]:
    """Open such a folder: its tokenizer, its arrays, and what our meta.json would say of them,
    which is counted where it is not known yet.

    Raises:
        UserError: if meta.pkl is not a vocabulary of characters, an array is missing, or holds an
            id that the tokenizer has not.
    """
    tokenizer = _tokenizer(folder)
    arrays, counts = [], []
    for split in SPLITS:
        path = folder / f"{split}.bin"
        ids = _map(path)
        counts.append(_counted(path, ids, tokenizer, verified))
        arrays.append(Tokens(ids, tokenizer.vocab_size))
    origin = {"nanogpt": folder.name}
    meta = Meta(FORMAT, DTYPE, tokenizer.vocab_size, tokenizer.fingerprint, origin, *counts)
    train, val = arrays
    return meta, tokenizer, train, val


def _tokenizer(folder: Path) -> BPETokenizer | CharTokenizer:
    path = folder / VOCABULARY
    if not files.lexists(path):  # a link to nothing is there, and refused
        return bpe.gpt2()
    return meta_pickle.tokenizer(path)


def _map(path: Path) -> np.ndarray:
    if not files.is_file(path):
        raise UserError(f"{path.parent} has no {path.name}", "nanoGPT's prepare.py writes both.")
    if path.stat().st_size % 2 or not path.stat().st_size:
        raise UserError(f"{path} is cut short or empty", "write it again.")
    with files.naming(path):
        return np.memmap(path, dtype=DTYPE, mode="r")


def _counted(
    path: Path, ids: np.ndarray, tokenizer: BPETokenizer | CharTokenizer, verified: Verified
) -> SplitMeta:
    """What meta.json would say of one array, each of its ids checked."""
    vocabulary = path.parent / VOCABULARY
    paths = [path, vocabulary] if files.exists(vocabulary) else [path]
    found = verified.once(path.name, paths, lambda: _count(path, tokenizer))
    return SplitMeta(len(ids), found["documents"], found["bytes"], found["sha256"])


def _count(path: Path, tokenizer: BPETokenizer | CharTokenizer) -> dict[str, Any]:
    times = np.zeros(1 << 16, dtype=np.int64)  # each id comes

    def add(ids: np.ndarray) -> None:
        nonlocal times
        times += np.bincount(ids, minlength=len(times))

    found = read_whole(path, DTYPE, add)
    if found["largest"] >= tokenizer.vocab_size:
        raise _unknown(path, found["largest"], tokenizer)
    size = int(times[: tokenizer.vocab_size] @ byte_lengths(tokenizer))
    end = tokenizer.end_of_text
    documents = 1 if end is None else int(times[end])  # without an end, all of it is one
    return {**found, "documents": documents, "bytes": size}


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
