"""Memory-mapped token arrays, and the training batches taken from them with `get_batch(step)`.

A file is raw little-endian uint16 (uint32 for vocabularies above 65,536) without a header, as
nanoGPT's train.bin is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError
from mlxgpt.utils.seeds import derive_seed


def dtype_for(vocab_size: int) -> str:
    """The dtype of a token array: uint16 if every id fits, else uint32."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


READ_BLOCK_BYTES = 1 << 24  # 16 MiB per read


def scan_token_file(
    path: Path,
    dtype: str,
    on_block: Callable[[np.ndarray], None] = lambda ids: None,
    *,
    id_mask: int | None = None,
) -> dict[str, Any]:
    """Hash a token array file and find its largest id in one pass: {"sha256", "largest"}.

    Args:
        on_block: called with each block of ids.
        id_mask: bits of an element that are the id; default: all.

    Raises:
        OSError: if it cannot be read.
    """
    digest, largest, itemsize = hashlib.sha256(), 0, np.dtype(dtype).itemsize
    # Not memory-mapped: mapped pages would count toward this process's memory.
    with files.add_filename_to_errors(path), path.open("rb") as file:
        while block := file.read(READ_BLOCK_BYTES):
            digest.update(block)
            ids = np.frombuffer(block[: len(block) // itemsize * itemsize], dtype)
            largest = max(largest, int((ids if id_mask is None else ids & id_mask).max(initial=0)))
            on_block(ids)
    return {"sha256": digest.hexdigest(), "largest": largest}


def damaged_array_remedy(path: Path) -> str:
    """The remedy for a damaged token array of a data folder, without a final period."""
    return f"restore {path.name}; or move {path.parent} away and prepare the data again"


class Batch(NamedTuple):
    """A training batch: inputs and targets, int32 [A, B, T], and the weight of each target's loss,
    float32 [A, B, T], with mean 1; None if all weights are 1.

    A row of preference pairs is a chosen and a rejected answer, T / 2 tokens each, with weights 0
    and 1; `reference` has the reference model's log-probabilities of both, float32 [A, B, 2].
    """

    inputs: Any
    targets: Any
    weights: Any = None
    reference: Any = None


class Window(NamedTuple):
    """Consecutive tokens to evaluate on: ids [n + 1], and which of the last n count, bool [n]."""

    ids: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class TokenArray:
    """A memory-mapped token array, [n], and the vocabulary size of its tokenizer."""

    array: np.ndarray
    vocab_size: int

    @property
    def ids(self) -> np.ndarray:
        """Token ids, [n].

        Raises:
            UserError: if the file was truncated: reading the missing part would kill the process
                with SIGBUS.
            OSError: if its size cannot be read.
        """
        mmap = getattr(self.array, "_mmap", None)  # set on np.memmap
        if mmap is None:
            return self.array
        path = Path(getattr(self.array, "filename", "the token array"))
        with files.add_filename_to_errors(path):
            size = mmap.size()  # current size of the file
        if size < len(mmap):
            raise UserError(
                f"{path} was truncated while in use: {size:,} of {len(mmap):,} bytes remain",
                f"{damaged_array_remedy(path)}, then run the same command again.",
            )
        return self.array

    def get_batch(
        self, step: int, *, seed: int, batch_size: int, block_size: int, micro_batches: int = 1
    ) -> Batch:
        """The training batch of a step, a pure function of the array and the arguments.

        Each epoch splits the array into blocks from a random offset and shuffles the blocks, so
        every token is seen about once per epoch. There is no loader state to save: the batch
        depends only on the step, not on the steps before it.

        Args:
            step: optimizer step, from 0.
            batch_size, block_size: B sequences of T tokens in each micro-batch.
            micro_batches: A, the number of micro-batches per optimizer step.

        Returns:
            inputs and targets, int32 [A, B, T]; targets are the inputs shifted by one token.
        """
        rows_per_step, ids = batch_size * micro_batches, self.ids
        n_blocks = blocks_per_epoch(len(ids), block_size)
        rows = range(step * rows_per_step, (step + 1) * rows_per_step)
        starts = [
            _block_starts(len(ids), block_size, seed, row // n_blocks)[row % n_blocks]
            for row in rows
        ]
        sequences = np.stack([ids[s : s + block_size + 1] for s in starts]).astype(np.int32)
        self._check_ids(sequences)
        shape = (micro_batches, batch_size, block_size)
        return Batch(sequences[:, :-1].reshape(shape), sequences[:, 1:].reshape(shape))

    def row_length(self, block_size: int) -> int:
        """Length of a batch's rows."""
        return block_size

    def windows(self, block_size: int, bos: int | None, limit: int | None = None) -> list[Window]:
        """Non-overlapping windows of `block_size` tokens to evaluate on; every token but the first
        is predicted once, with `bos` the first too.

        Args:
            limit: approximate number of tokens to predict, in windows spread evenly over the array;
                default: all.
        """
        ids = np.asarray(self.ids, dtype=np.int32)
        if bos is not None:
            ids = np.concatenate([np.array([bos], dtype=np.int32), ids])
        count = num_windows = math.ceil((len(ids) - 1) / block_size)
        if limit is not None:
            count = max(1, min(num_windows, math.ceil(limit / block_size)))
        all_count = np.ones(block_size, dtype=bool)
        starts = block_size * (np.arange(count) * num_windows // max(1, count))
        windows = (ids[start : start + block_size + 1] for start in starts)
        return [Window(window, all_count[: len(window) - 1]) for window in windows]

    def _check_ids(self, ids: np.ndarray) -> None:
        # MLX does not check gather bounds: too large an id would read unrelated memory.
        if ids.size and ids.max() >= self.vocab_size:
            raise UserError(
                f"the token array contains id {ids.max()}, but the largest id in the vocabulary is "
                f"{self.vocab_size - 1}",
                "prepare the data again.",
            )


def blocks_per_epoch(n_tokens: int, block_size: int) -> int:
    """Number of non-overlapping blocks that fit at any offset, plus one token as last target."""
    if n_tokens < block_size + 1:
        raise UserError(
            f"the training data has {n_tokens:,} tokens, too few for block size {block_size:,}",
            f"use more data, or --block-size {max(1, n_tokens - 1)} or less.",
        )
    return max(1, (n_tokens - block_size) // block_size)


@lru_cache(maxsize=2)  # a batch may span two epochs
def _block_starts(n_tokens: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    """Start indices of the blocks of an epoch, in shuffled order."""
    n_blocks = blocks_per_epoch(n_tokens, block_size)
    words = _random_words(n_blocks + 1, seed, epoch)
    slack = min(block_size, n_tokens - n_blocks * block_size)
    offset = int(words[-1] % np.uint64(slack))
    return offset + block_size * np.argsort(words[:-1], kind="stable")


@lru_cache(maxsize=2)
def epoch_permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers below `count` in the shuffled order of an epoch."""
    return np.argsort(_random_words(count, seed, epoch), kind="stable")


def _random_words(count: int, seed: int, epoch: int) -> np.ndarray:
    # The raw output of Philox never changes; the methods of numpy's Generator may give other
    # numbers in other versions.
    key = np.array([derive_seed(seed, "data"), epoch], dtype=np.uint64)
    words: np.ndarray = np.random.Philox(key=key).random_raw(count)
    return words
