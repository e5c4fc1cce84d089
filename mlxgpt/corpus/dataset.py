"""Opens a prepared data folder, ours or nanoGPT's: the one room that knows both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxgpt import files
from mlxgpt.corpus import nanogpt, tokenizer_file
from mlxgpt.corpus.meta import SPLITS, Meta, SplitMeta, read_meta
from mlxgpt.corpus.tokenizer import Tokenizer
from mlxgpt.corpus.tokens import Tokens
from mlxgpt.errors import UserError

BLOCK = 1 << 24  # bytes of an array at a time


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
    return (folder / "meta.json").is_file() or (folder / "train.bin").is_file()


def open_dataset(folder: Path) -> Dataset:
    """Open a prepared data folder and verify it; or one of nanoGPT's.

    Raises:
        UserError: if it is missing, damaged, of a newer format, or not of one piece.
    """
    ours = any((folder / name).exists() for name in ("meta.json", "tokenizer.json"))
    if is_prepared(folder) and not ours:
        return Dataset(folder, *nanogpt.open_arrays(folder))
    files.only_plain(folder)
    meta = read_meta(folder)
    tokenizer = tokenizer_file.load(folder / "tokenizer.json")
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (meta.tokenizer, meta.vocab_size):
        raise UserError(
            f"{folder}: the token arrays were made with another tokenizer than tokenizer.json",
            "delete this folder and prepare the data again.",
        )
    arrays = [_open_array(folder / f"{split}.bin", meta, getattr(meta, split)) for split in SPLITS]
    return Dataset(folder, meta, tokenizer, *arrays)


def _open_array(path: Path, meta: Meta, split: SplitMeta) -> Tokens:
    dtype = np.dtype(meta.dtype)
    digest, largest = hashlib.sha256(), 0
    try:
        # Read, not mapped: pages of a map count as this process's memory.
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                ids = np.frombuffer(block[: len(block) // dtype.itemsize * dtype.itemsize], dtype)
                largest = max(largest, int(ids.max(initial=0)))
        whole = path.stat().st_size == split.tokens * dtype.itemsize
        if digest.hexdigest() != split.sha256 or not whole or largest >= meta.vocab_size:
            raise UserError(
                f"{path} is not the array that meta.json describes",
                "delete this folder and prepare the data again.",
            )
        return Tokens(np.memmap(path, dtype=dtype, mode="r"), meta.vocab_size)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", "prepare the data again."
        ) from error
