"""Prepared data: memory-mapped token arrays and their meta.json; `batch(step)`.

An array is raw little-endian uint16 (uint32 above 65,536 ids) and nothing else, so that nanoGPT's
train.bin has the same form.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt import files
from mlxgpt.corpus import tokenizer as tokenizers
from mlxgpt.corpus.tokenizer import Tokenizer
from mlxgpt.errors import UserError
from mlxgpt.seeds import derive

FORMAT = 1
SPLITS = ("train", "val")
BLOCK = 1 << 24  # bytes of an array at a time


def dtype_for(vocab_size: int) -> str:
    """The smallest of the two array types that holds every id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


@dataclass(frozen=True)
class SplitMeta:
    """What meta.json says of one array: its length in tokens, documents and UTF-8 bytes of text
    (end-of-text not counted), and the sha256 of the file.
    """

    tokens: int
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Meta:
    """A data folder's meta.json."""

    format: int
    dtype: str
    vocab_size: int
    tokenizer: str
    origin: dict[str, Any]
    train: SplitMeta
    val: SplitMeta

    def to_json(self) -> str:
        return files.sealed(asdict(self))

    @property
    def fingerprint(self) -> str:
        """Identity of the data: equal fingerprints mean equal batches and equal evaluation."""
        parts = [self.train.sha256, self.val.sha256, self.tokenizer]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Tokens:
    """One token array, memory-mapped: ids[n], and the size of the vocabulary they are from."""

    ids: np.ndarray
    vocab_size: int

    def batch(
        self, step: int, *, seed: int, batch_size: int, block_size: int, micro_batches: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """The training batch of a step: a pure function of the array and the arguments.

        The array is cut into blocks at an offset; each epoch has its own random offset and visits
        its blocks in its own random order, so every token is seen about once an epoch. There is
        no loader state: a step's batch does not depend on how the training got there.

        Args:
            step: which update, from 0.
            batch_size, block_size: B sequences of T tokens in each micro-batch.
            micro_batches: A, the number of micro-batches; all are different.

        Returns:
            inputs[A, B, T] and targets[A, B, T], int32; targets are the inputs one token on.
        """
        need = batch_size * micro_batches
        blocks = blocks_per_epoch(len(self.ids), block_size)
        rows = range(step * need, (step + 1) * need)
        starts = [
            _starts(len(self.ids), block_size, seed, row // blocks)[row % blocks] for row in rows
        ]
        window = np.stack([self.ids[s : s + block_size + 1] for s in starts]).astype(np.int32)
        self._check(window)
        shape = (micro_batches, batch_size, block_size)
        return window[:, :-1].reshape(shape), window[:, 1:].reshape(shape)

    def _check(self, ids: np.ndarray) -> None:
        # The device never checks a gather's bounds: an id too large reads stray memory.
        if ids.size and ids.max() >= self.vocab_size:
            raise UserError(
                f"the token array holds id {ids.max()}, but the vocabulary ends at "
                f"{self.vocab_size - 1}",
                "prepare the data again.",
            )


def blocks_per_epoch(tokens: int, block_size: int) -> int:
    """How many non-overlapping blocks fit at any offset, each followed by one more token."""
    if tokens < block_size + 1:
        raise UserError(
            f"the training text has {tokens} tokens, too few for a block of {block_size}",
            f"use a longer text, or --block-size {max(1, tokens - 1)} or less.",
        )
    return max(1, (tokens - block_size) // block_size)


@lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def _starts(tokens: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    """Where each block of an epoch begins, in the order of that epoch."""
    blocks = blocks_per_epoch(tokens, block_size)
    # Raw words of a counter-based generator, whose stream is fixed for good; the methods of
    # numpy's Generator may change theirs between versions.
    key = np.array([derive(seed, "data"), epoch], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(blocks + 1)
    slack = min(block_size, tokens - blocks * block_size)
    offset = int(words[-1] % np.uint64(slack))
    return offset + block_size * np.argsort(words[:-1], kind="stable")


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
        from mlxgpt.corpus import nanogpt

        return nanogpt.open_arrays(folder)
    files.only_plain(folder)
    meta = read_meta(folder)
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (meta.tokenizer, meta.vocab_size):
        raise UserError(
            f"{folder}: the token arrays were made with another tokenizer than tokenizer.json",
            "delete this folder and prepare the data again.",
        )
    arrays = [_open_array(folder / f"{split}.bin", meta, getattr(meta, split)) for split in SPLITS]
    return Dataset(folder, meta, tokenizer, *arrays)


def read_meta(folder: Path) -> Meta:
    """Read a data folder's meta.json.

    Raises:
        UserError: if it is missing, damaged or of a newer format.
    """
    path = folder / "meta.json"
    try:
        tree = files.read_sealed(path, FORMAT)
        train, val = (SplitMeta(**tree.pop(split)) for split in SPLITS)
        meta = Meta(**tree, train=train, val=val)
        sizes = [meta.vocab_size, *(n for s in (train, val) for n in (s.tokens, s.bytes))]
        if any(type(n) is not int or not 0 < n < 1 << 48 for n in sizes):
            raise ValueError("its sizes are none")
        if meta.dtype != dtype_for(meta.vocab_size) or not isinstance(meta.origin, dict):
            raise ValueError("it does not hold together")
        return meta
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no prepared data", "run: mlxgpt prepare, or give --source."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged: {error}", "delete this folder and prepare the data again."
        ) from error


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
