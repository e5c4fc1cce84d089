"""Opens a prepared data folder, ours or nanoGPT's: the only module that knows both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxgpt.data import nanogpt
from mlxgpt.data.hash_cache import Verified
from mlxgpt.data.meta import SPLITS, Meta, SplitMeta, read_meta
from mlxgpt.data.token_array import Tokens, read_whole, restore
from mlxgpt.data.tokenizers import tokenizer_json
from mlxgpt.data.tokenizers.char import Tokenizer
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """A prepared data folder."""

    folder: Path
    meta: Meta
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens

    @property
    def name(self) -> str:
        return self.folder.name


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds token arrays, ours or nanoGPT's."""
    return files.is_file(folder / "meta.json") or files.is_file(folder / "train.bin")


def open_dataset(folder: Path, *, verify: bool = False) -> Dataset:
    """Open a prepared data folder, or one of nanoGPT's. Arrays that were not verified yet, or were
    changed since, are read whole.

    Args:
        verify: read them also if they were.

    Raises:
        UserError: if it is missing, damaged, of a newer format, or not of one piece.
    """
    verified = Verified(folder, reread=verify)
    ours = any(files.exists(folder / name) for name in ("meta.json", "tokenizer.json"))
    if is_prepared(folder) and not ours:
        parts = nanogpt.open_arrays(folder, verified)
        verified.save()
        return Dataset(folder, *parts)
    files.only_plain(folder)
    meta = read_meta(folder)
    tokenizer = tokenizer_json.load(folder / "tokenizer.json")
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (meta.tokenizer, meta.vocab_size):
        raise UserError(
            f"{folder}: the token arrays were made with another tokenizer than tokenizer.json",
            "move this folder away, and prepare the data again.",
        )
    arrays = [
        _open_array(folder / f"{split}.bin", meta, getattr(meta, split), verified)
        for split in SPLITS
    ]
    verified.save()
    return Dataset(folder, meta, tokenizer, *arrays)


def _open_array(path: Path, meta: Meta, split: SplitMeta, verified: Verified) -> Tokens:
    dtype, remedy = np.dtype(meta.dtype), f"{restore(path)}."
    try:
        expected, size = split.tokens * dtype.itemsize, path.stat().st_size
        if size != expected:
            raise UserError(
                f"{path} has {size:,} bytes, and meta.json describes {expected:,}", remedy
            )
        found = verified.once(path.name, [path], lambda: read_whole(path, meta.dtype))
        right = found.get("sha256") == split.sha256
        if not right or not 0 <= found.get("largest", -1) < meta.vocab_size:
            raise UserError(f"{path} is not the array that meta.json describes", remedy)
        with files.naming(path):
            return Tokens(np.memmap(path, dtype=dtype, mode="r"), meta.vocab_size)
    except FileNotFoundError as error:
        raise files.os_error(error, "read", path, remedy) from error
