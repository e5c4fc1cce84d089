"""Arrays of examples: token ids, where each example starts, and which tokens are trained.

A file is raw little-endian uint32: the token id, plus a bit for the first token of an example and a
bit for trained tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mlxgpt.data.token_array import Batch, TokenArray, Window, epoch_permutation

EXAMPLE_DTYPE = "<u4"
FIRST, TRAINED = 1 << 30, 1 << 31
ID_MASK = FIRST - 1
ROW_MULTIPLE = 32  # row lengths are multiples of this, so that few shapes are compiled


def pack_examples(examples: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Pack examples, each as ids [n] and trained [n], into one array of `EXAMPLE_DTYPE`."""
    parts = []
    for ids, trained in examples:
        packed = ids.astype(EXAMPLE_DTYPE) | np.where(trained, TRAINED, 0).astype(EXAMPLE_DTYPE)
        packed[0] |= FIRST
        parts.append(packed)
    return np.concatenate(parts)


@dataclass(frozen=True)
class ExampleArray:
    """Examples in one array, see `pack_examples`, and the vocabulary size of their tokenizer. A row
    of a batch is one example, padded at its end: causal attention never reads padding.
    """

    array: np.ndarray
    vocab_size: int

    @cached_property
    def ids(self) -> np.ndarray:
        """Token ids of all examples, int32 [n]."""
        return (self.array & ID_MASK).astype(np.int32)

    @cached_property
    def _starts(self) -> np.ndarray:
        """Start of each example, and the end of the last one, [examples + 1]."""
        return np.append(np.flatnonzero(self.array & FIRST), len(self.array))

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._starts) - 1

    def example(self, index: int) -> Window:
        """An example: ids [n + 1], and which of the last n are trained, bool [n]."""
        start, end = self._starts[index], self._starts[index + 1]
        trained = (self.array[start:end] & TRAINED) != 0
        return Window(self.ids[start:end], trained[1:])

    def prompt(self, index: int) -> np.ndarray:
        """The ids of an example before the first trained token."""
        ids, trained = self.example(index)
        return ids[: 1 + int(np.argmax(trained))]

    def row_length(self, block_size: int) -> int:
        """Length of a batch's rows: of the longest example, rounded up."""
        longest = int(np.diff(self._starts).max()) - 1
        return min(block_size, -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE)

    @property
    def tokens_per_row(self) -> float:
        """Mean number of tokens in a batch's row, without padding."""
        return float(np.diff(self._starts).mean()) - 1

    def get_batch(
        self, step: int, *, seed: int, batch_size: int, block_size: int, micro_batches: int = 1
    ) -> Batch:
        """The training batch of a step, as of `TokenArray`. Each epoch shuffles the examples.

        Returns:
            inputs and targets, int32 [A, B, T], and weights, float32 [A, B, T]: 0 for what is not
            trained, and equal for all trained tokens, with mean 1. So the mean weighted loss is the
            mean loss of the trained tokens, however they are divided among micro-batches and ranks.
        """
        indices = _shuffled_indices(step, batch_size * micro_batches, len(self), seed)
        inputs, targets, mask = pad_windows(map(self.example, indices), self.row_length(block_size))
        weights = mask * np.float32(mask.size / mask.sum())
        shape = (micro_batches, batch_size, -1)
        return Batch(inputs.reshape(shape), targets.reshape(shape), weights.reshape(shape))

    def windows(self, block_size: int, bos: int | None, limit: int | None = None) -> list[Window]:
        """Examples to evaluate on, spread evenly; about `limit` tokens, default: all."""
        count = len(self)
        if limit is not None:
            count = max(1, min(count, round(count * limit / len(self.ids))))
        return [self.example(n * len(self) // count) for n in range(count)]


@dataclass(frozen=True)
class PairArray(ExampleArray):
    """Preference pairs: examples 2n and 2n + 1 are the chosen and the rejected answer of pair n.

    Attributes:
        reference: log-probabilities of all answers under the reference model, float32 [pairs, 2];
            None until they are computed.
    """

    reference: np.ndarray | None = None

    @property
    def pair_count(self) -> int:
        return len(self) // 2

    @property
    def tokens_per_row(self) -> float:
        return 2 * super().tokens_per_row

    def get_batch(
        self, step: int, *, seed: int, batch_size: int, block_size: int, micro_batches: int = 1
    ) -> Batch:
        """The training batch of a step; a row is a pair, see `Batch`. Each epoch shuffles the
        pairs.
        """
        assert self.reference is not None
        pairs = _shuffled_indices(step, batch_size * micro_batches, self.pair_count, seed)
        answers = (self.example(2 * pair + n) for pair in pairs for n in (0, 1))
        arrays = (*pad_windows(answers, self.row_length(block_size)), self.reference[pairs])
        return Batch(*(array.reshape(micro_batches, batch_size, -1) for array in arrays))

    def windows(self, block_size: int, bos: int | None, limit: int | None = None) -> list[Window]:
        """Chosen answers to evaluate on, spread evenly; about `limit` tokens, default: all."""
        return [self.example(2 * pair) for pair in self.spread_pairs(limit)]

    def spread_pairs(self, limit: int | None = None) -> list[int]:
        """Indices of pairs, spread evenly; of about `limit` tokens, default: all."""
        count = self.pair_count
        if limit is not None:
            count = max(1, min(count, round(count * limit / len(self.ids))))
        return [n * self.pair_count // count for n in range(count)]


def _shuffled_indices(step: int, rows: int, count: int, seed: int) -> list[int]:
    """Which of `count` examples or pairs are the rows of a step."""
    places = (divmod(step * rows + row, count) for row in range(rows))
    return [int(epoch_permutation(count, seed, epoch)[index]) for epoch, index in places]


def pad_windows(
    windows: Iterable[Window], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pad windows to rows of `length`: inputs and targets, int32, and which targets are trained,
    float32, each [B, length].
    """
    rows = list(windows)
    inputs, targets = np.zeros((2, len(rows), length), dtype=np.int32)
    mask = np.zeros((len(rows), length), dtype=np.float32)
    for row, (ids, trained) in enumerate(rows):
        size = len(trained)
        inputs[row, :size], targets[row, :size], mask[row, :size] = ids[:-1], ids[1:], trained
    return inputs, targets, mask


SplitArray = TokenArray | ExampleArray  # of the training or validation split of a dataset
