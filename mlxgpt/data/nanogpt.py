"""nanoGPT's data folders: train.bin and val.bin with uint16 ids of the GPT-2 tokenizer, or of
characters if there is a meta.pkl with their vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.data import meta_pickle
from mlxgpt.data.hash_cache import HashCache
from mlxgpt.data.meta import META_FORMAT_VERSION, SPLITS, DatasetMeta, SplitMeta
from mlxgpt.data.token_array import TokenArray, scan_token_file
from mlxgpt.data.tokenizers import bpe
from mlxgpt.data.tokenizers.base import byte_lengths
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

TOKEN_DTYPE = "<u2"
VOCAB_FILENAME = "meta.pkl"


def open_nanogpt_arrays(
    folder: Path, hash_cache: HashCache
) -> tuple[DatasetMeta, BPETokenizer | CharTokenizer, TokenArray, TokenArray]:
    """Open a nanoGPT data folder: metadata (counted on first use, then cached), tokenizer, and
    token arrays for training and validation.

    Raises:
        UserError: if meta.pkl is not a character vocabulary, or an array is missing or contains an
            id that is not in the vocabulary.
    """
    tokenizer = _load_tokenizer(folder)
    arrays, split_metas = [], []
    for split in SPLITS:
        path = folder / f"{split}.bin"
        ids = _mmap_ids(path)
        split_metas.append(_build_split_meta(path, ids, tokenizer, hash_cache))
        arrays.append(TokenArray(ids, tokenizer.vocab_size))
    origin = {"nanogpt": folder.name}
    meta = DatasetMeta(
        META_FORMAT_VERSION,
        TOKEN_DTYPE,
        tokenizer.vocab_size,
        tokenizer.fingerprint,
        origin,
        *split_metas,
    )
    train, val = arrays
    return meta, tokenizer, train, val


def _load_tokenizer(folder: Path) -> BPETokenizer | CharTokenizer:
    path = folder / VOCAB_FILENAME
    if not files.lexists(path):  # a broken link counts as present, and is rejected
        return bpe.load_gpt2_tokenizer()
    return meta_pickle.load_char_tokenizer(path)


def _mmap_ids(path: Path) -> np.ndarray:
    if not files.is_file(path):
        raise UserError(
            f"{path.parent} has no {path.name}", "write both with nanoGPT's prepare.py."
        )
    if path.stat().st_size % 2 or not path.stat().st_size:
        raise UserError(f"{path} is truncated or empty", "copy it or prepare it again.")
    with files.add_filename_to_errors(path):
        return np.memmap(path, dtype=TOKEN_DTYPE, mode="r")


def _build_split_meta(
    path: Path, ids: np.ndarray, tokenizer: BPETokenizer | CharTokenizer, hash_cache: HashCache
) -> SplitMeta:
    """Sizes and hash of one array, after checking its ids."""
    vocab_path = path.parent / VOCAB_FILENAME
    paths = [path, vocab_path] if files.exists(vocab_path) else [path]
    counts = hash_cache.get_or_compute(path.name, paths, lambda: _count_file(path, tokenizer))
    return SplitMeta(len(ids), counts["documents"], counts["bytes"], counts["sha256"])


def _count_file(path: Path, tokenizer: BPETokenizer | CharTokenizer) -> dict[str, Any]:
    id_counts = np.zeros(1 << 16, dtype=np.int64)  # count per id

    def count_ids(ids: np.ndarray) -> None:
        nonlocal id_counts
        id_counts += np.bincount(ids, minlength=len(id_counts))

    stats = scan_token_file(path, TOKEN_DTYPE, count_ids)
    if stats["largest"] >= tokenizer.vocab_size:
        raise _unknown_id_error(path, stats["largest"], tokenizer)
    size = int(id_counts[: tokenizer.vocab_size] @ byte_lengths(tokenizer))
    end = tokenizer.end_of_text
    documents = 1 if end is None else int(id_counts[end])  # without end-of-text: one document
    return {**stats, "documents": documents, "bytes": size}


def _unknown_id_error(path: Path, id: int, tokenizer: BPETokenizer | CharTokenizer) -> UserError:
    if isinstance(tokenizer, CharTokenizer):
        return UserError(
            f"{path} contains id {id}, but {VOCAB_FILENAME} has {tokenizer.vocab_size:,} tokens",
            "they do not belong together: write both again with nanoGPT's prepare.py.",
        )
    return UserError(
        f"{path} contains id {id}, but GPT-2 has {tokenizer.vocab_size:,} tokens",
        "these are not GPT-2 token ids: prepare the original text, --source FILE.",
    )
