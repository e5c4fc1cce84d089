"""Prompts -> ids: prefill, cache, one row of new ids after the other. Each text is drawn as if it
were alone: with its own keys, and exactly so where the products of a batch are rounded as those of
a single row are, as on the CPU. An M5's GPU and CUDA round float32 to TF32 in the former only.
Knows a model, nothing of texts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlxgpt.backend import execution, ops
from mlxgpt.backend.execution import compiled
from mlxgpt.config import Sampling
from mlxgpt.errors import UserError
from mlxgpt.inference import sample
from mlxgpt.inference.sample import Rules, Telling
from mlxgpt.machine import device
from mlxgpt.model.counting import count_parameters, flops_per_token
from mlxgpt.model.gpt import GPT, Cache, Linear, parted, with_room
from mlxgpt.seeds import derive

BUCKETS = 8  # lengths that a step is traced for, at most: this share of a block more is looked at
# whenever what was is filled
SMALLEST_BUCKET = 16  # tokens
LARGE = 64_000_000  # bytes of a cache
NOT_FINITE = -1  # in the place of an id, where none can be drawn
ROOM = 1e7  # by which a temperature and a penalty can enlarge a logit, which must stay finite then
SMALL = 4_000_000  # parameters: with fewer, products are too small for several threads of BLAS, and
# those that wait for the next one would only be in the way; and a copy of the weights is cheap


class NotFiniteError(UserError):
    """A model's logits are NaN or infinite, so that no token can be drawn from them."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are not finite numbers (NaN or infinity)",
            "use another checkpoint: --checkpoint newest, or a step number; "
            "or train again with a lower --learning-rate.",
        )


def are_finite(logits: mx.array) -> mx.array:
    """Of each row of logits[..., V], whether it stays finite under every setting of sampling."""
    return mx.isfinite(logits.astype(mx.float32) * ROOM).all(axis=-1)


class Decoder:
    """A model's compiled prefill and steps, to be kept. They are traced once for each of `BUCKETS`
    lengths, of prompts and of what is looked at of the cache; anew for another number of texts,
    another kind of sampling, and as many lengths of a prompt that is kept once. The model's weights
    are part of the traces, and must not change.

    Args:
        vocab_size: ids from here on are never drawn: a model may have room for more than its
            tokenizer gives.
    """

    def __init__(self, model: GPT, vocab_size: int) -> None:
        self.config = model.config
        self.vocab_size = vocab_size
        self.slides = model.slides
        small = count_parameters(model.config) < SMALL
        self.blas_share = execution.blas_thread_count() if small else 1
        if small and device.on_cpu():
            model = _by_columns(model)
        # Functions that do not know this object: with a cycle it would outlive its use, and its
        # arrays would leave the memory around them in pieces.
        self.prefill = compiled(model.prefill)
        self._choose = partial(_choose, vocab_size)
        self._decode = partial(_decode, model, self._choose)
        self._compiled: dict[tuple[Rules, int, int], Callable] = {}

    def choose(self, rules: Rules, told: int = 0) -> Callable:
        """What draws after a prefill, and tells of so many likely tokens."""
        return self._kept((rules, told, 0), self._choose, rules, told)

    def decode(self, rules: Rules, told: int, seen: int) -> Callable:
        """What takes a step, seeing so many places of the cache."""
        return self._kept((rules, told, seen), self._decode, rules, told, seen)

    def after(self, ids: np.ndarray) -> mx.array:
        """Logits[V] of what follows the last of some ids, of which no more than the block count."""
        ids = ids[-self.config.block_size :]
        padded = np.zeros((1, _bucket(len(ids), self.config.block_size)), dtype=np.int32)
        padded[0, : len(ids)] = ids
        with execution.share_blas_threads(self.blas_share):
            logits, _ = self.prefill(mx.array(padded), mx.array([len(ids) - 1], dtype=mx.int32))
            finite = are_finite(logits).all()
            mx.eval(logits, finite)
        if not finite:
            raise NotFiniteError
        return logits[0]

    def _kept(self, key: tuple[Rules, int, int], function: Callable, *given: Any) -> Callable:
        if key not in self._compiled:
            self._compiled[key] = compiled(partial(function, *given))
        return self._compiled[key]


class Decoding:
    """A batch of texts under way. Iterating gives `max_tokens` rows, with one new id for each text.
    The next row is under way on the device while the last one is read.

    Where many texts have one prompt, on the CPU, its keys and values are kept once.

    A full cache slides, where the model can: see `GPT.slides`. With learned positions a text's last
    half block is read in again instead, from position 0.

    Args:
        texts: of each its prompt's ids, at least one, of which as many as the block holds count,
            the last; and its number, so that those with one prompt are drawn differently.
        end_of_text: no repetition where a prompt began with it and the text ends.
        alternatives: of how many of the likeliest tokens `told` tells; 0: of nothing.

    Attributes:
        told: of the row given last, by the model's own probabilities, before any setting of
            sampling: (those of the drawn ids, [B]; the likeliest ids, [B, alternatives], and
            theirs). () without alternatives.
    """

    def __init__(
        self,
        decoder: Decoder,
        texts: Sequence[tuple[np.ndarray, int]],
        sampling: Sampling,
        end_of_text: int | None = None,
        alternatives: int = 0,
    ) -> None:
        block = decoder.config.block_size
        self._decoder, self._sampling, self._block = decoder, sampling, block
        rules = Rules.of(sampling, decoder.vocab_size)
        self._rules = rules
        self._numbers = sample.values(sampling)
        # Each row's tokens in the window, its keys' beginning, and how many tokens its cache holds.
        self._texts = [prompt[-block:].tolist() for prompt, _ in texts]
        self._needed = max(map(len, self._texts)) + sampling.max_tokens
        seeds = [derive(sampling.seed or 0, "sample", number) for _, number in texts]
        self._seeds = np.array(seeds, dtype=np.uint64)
        self._filled = np.zeros(len(self._texts), dtype=np.int32)
        # Without a penalty nobody looks; but an array without columns crashes MLX.
        columns = decoder.config.vocab_size if rules.penalty else 1
        seen = np.zeros((len(texts), columns), dtype=bool)
        if rules.penalty:
            for row, (prompt, _) in zip(seen, texts, strict=True):
                row[prompt[prompt != end_of_text]] = True
        self._seen = mx.array(seen)
        self._ids = mx.zeros(len(self._texts), dtype=mx.int32)
        self._prompt: Cache = []  # of what all texts begin with, if it is kept once
        self._cache: Cache = []  # of what is behind it
        self._alternatives = min(alternatives, decoder.vocab_size)
        self._telling: Telling = ()
        self.told: tuple[list, ...] = ()

    def __iter__(self) -> Iterator[list[int]]:
        """Rows of new ids.

        Raises:
            NotFiniteError: where a text's logits are not finite.
        """
        with execution.share_blas_threads(self._decoder.blas_share):
            yield from self._rows()

    def _rows(self) -> Iterator[list[int]]:
        most = self._sampling.max_tokens
        self._read(np.arange(len(self._texts)), 0, self._seen)
        # The first at once; the others while the following is under way.
        yield self._row(self._ids, self._telling)
        for n in range(1, most):
            ids, telling, seen, row = self._ids, self._telling, self._seen, list[int]()
            full = np.flatnonzero(self._filled == self._block)
            if self._decoder.slides:
                full = full[:0]
            if len(full) < len(self._texts):
                self._take_step(n)
            if n > 1:
                row = self._row(ids, telling)
            if len(full):
                self._read(full, n, seen)
            if n > 1:
                yield row
        if most > 1:
            yield self._row(self._ids, self._telling)

    def _row(self, ids: mx.array, telling: Telling) -> list[int]:
        """New ids, once they are there, behind each text's."""
        row: list[int] = ids.tolist()  # type: ignore[assignment]
        if NOT_FINITE in row:
            raise NotFiniteError
        self.told = tuple(array.tolist() for array in telling)  # type: ignore[misc]
        for text, id in zip(self._texts, row, strict=True):
            text.append(id)
            del text[: -self._block]
        return row

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone; from now on they are 0, 1, 2, …"""
        chosen = mx.array(rows)
        self._texts = [self._texts[row] for row in rows]
        self._seeds, self._filled = self._seeds[rows], self._filled[rows]
        self._ids, self._seen = self._ids[chosen], self._seen[chosen]
        self._telling = tuple(array[chosen] for array in self._telling)
        self._cache = [(keys[chosen], values[chosen]) for keys, values in self._cache]

    def _read(self, rows: np.ndarray, n: int, seen: mx.array) -> None:
        """Read some rows in, at first whole, later their last half blocks, and draw each one's
        token n. What several have in common is read once.
        """
        texts = [self._texts[row] for row in rows]
        if n:
            texts = [text[-max(1, self._block // 2) :] for text in texts]
        different = list(dict.fromkeys(map(tuple, texts)))
        lengths = np.array([len(text) for text in different], dtype=np.int32)
        ids = np.zeros((len(different), _bucket(max(lengths), self._block)), dtype=np.int32)
        for row, text in zip(ids, different, strict=True):
            row[: len(text)] = text
        if len(rows) == len(self._texts):
            self._prompt, self._cache = [], []  # before there are others
        logits, cache = self._prefill(ids, lengths - 1)
        room = max(ids.shape[1], _room(self._needed, self._block))
        if len(different) == 1 and (shared := self._shared(cache, int(lengths[0]))):
            self._prompt, cache = parted(cache, shared)
            room -= shared
        cache = with_room(cache, room)
        if len(different) < len(rows):
            places = {text: place for place, text in enumerate(different)}
            each = mx.array([places[tuple(text)] for text in texts])
            logits, cache = logits[each], [(k[each], v[each]) for k, v in cache]
        self._filled[rows] = [len(text) for text in texts]
        choose = self._decoder.choose(self._rules, self._alternatives)
        drawn, seen, telling = choose(
            logits, seen[mx.array(rows)], self._keys(rows, n), self._numbers
        )
        if len(rows) == len(self._texts):
            self._ids, self._seen, self._telling, self._cache = drawn, seen, telling, cache
        else:
            self._put(mx.array(rows), drawn, seen, telling, cache)
        mx.async_eval(self._ids, self._seen, self._telling, self._cache)

    def _prefill(self, ids: np.ndarray, last: np.ndarray) -> tuple[mx.array, Cache]:
        """Logits[B, V] after place `last`[B] of ids[B, T], and the cache. On Metal in parts, so
        that no command buffer is large.
        """
        forward = ids.shape[1] * flops_per_token(self._decoder.config) / 3
        most = device.rows_at_once(forward) or len(ids)
        if most >= len(ids):
            last = last[:1] if (last == last[0]).all() else last
            return self._decoder.prefill(mx.array(ids), mx.array(last))
        parts = []
        for part in np.array_split(np.arange(len(ids)), -(-len(ids) // most)):
            parts.append(self._prefill(ids[part], last[part]))
            mx.eval(parts[-1])
        logits, caches = zip(*parts, strict=True)
        keys_values = (map(list, zip(*layer, strict=True)) for layer in zip(*caches, strict=True))
        cache = [(mx.concatenate(keys), mx.concatenate(values)) for keys, values in keys_values]
        return mx.concatenate(list(logits)), cache

    def _shared(self, cache: Cache, length: int) -> int:
        """How many of a prompt's tokens are kept once: whole buckets, so that traces stay few."""
        step = _step(self._block)
        shared = length // step * step
        full = self._decoder.slides and self._needed > self._block
        pays = ops.shares_prompt(cache[0][0][:, :, :shared], len(self._texts))
        return shared if pays and not full else 0

    def _put(
        self, rows: mx.array, ids: mx.array, seen: mx.array, telling: Telling, cache: Cache
    ) -> None:
        """These rows in place of those that there are."""
        self._ids[rows], self._seen[rows] = ids, seen
        for mine, new in zip((self._telling, *self._cache), (telling, *cache), strict=True):
            for whole, part in zip(mine, new, strict=True):
                whole[rows] = part

    def _take_step(self, n: int) -> None:
        """Every row's token n; of a row that is full it is to be put right by `_read`."""
        # On the CPU a step that waits for another one copies the cache instead of writing into it;
        # of a small one that takes less than waiting here.
        if device.on_cpu() and 2 * len(self._cache) * self._cache[0][0].nbytes > LARGE:
            mx.eval(self._ids, self._seen, self._cache)
        filled = self._filled
        shared = self._prompt[0][0].shape[2] if self._prompt else 0
        seen = _bucket(int(filled.max()) + 1 - shared, self._block)
        seen = min(seen, self._cache[0][0].shape[2])
        same = bool((filled == filled[0]).all())
        position = filled[:1] if same else filled
        if not self._decoder.slides:
            position = np.minimum(position, self._block - 1)
        step = self._decoder.decode(self._rules, self._alternatives, seen)
        self._ids, self._seen, self._telling, self._cache = step(
            self._ids,
            self._seen,
            self._cache,
            self._prompt,
            mx.array(position),
            self._keys(np.arange(len(filled)), n),
            self._numbers,
        )
        self._filled = filled + 1
        mx.async_eval(self._ids, self._seen, self._telling, self._cache)

    def _keys(self, rows: np.ndarray, n: int) -> mx.array:
        """A key for each row's token n, uint32 [B, 2]: a function of the seed, which sample of its
        prompt it is, and n.
        """
        keys = self._seeds[rows] + np.uint64(n)
        return mx.array(keys.astype(">u8").view(">u4").astype(np.uint32).reshape(-1, 2))


def _by_columns(model: GPT) -> GPT:
    """A copy, with weights as `ops.by_columns` lays them out."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight = ops.by_columns(module.weight)
    mx.eval(model.parameters())
    return model


def _step(block: int) -> int:
    return max(SMALLEST_BUCKET, -(-block // BUCKETS))


def _bucket(length: int, block: int) -> int:
    """A length at least as great, of few; none above the block."""
    step = _step(block)
    return min(-(-length // step) * step, block)


def _room(length: int, block: int) -> int:
    """How long a cache is made for so many tokens."""
    room = SMALLEST_BUCKET
    while room < length:
        room *= 2
    return min(room, block)


def _choose(
    vocab_size: int,
    rules: Rules,
    alternatives: int,
    logits: mx.array,
    seen: mx.array,
    keys: mx.array,
    numbers: mx.array,
) -> tuple[mx.array, mx.array, Telling]:
    """(ids[B], seen with them, what there is to tell) from logits[B, V]. An id is NOT_FINITE where
    the logits are not finite.
    """
    finite = are_finite(logits)
    if vocab_size < logits.shape[-1]:
        logits = mx.where(mx.arange(logits.shape[-1]) < vocab_size, logits, sample.NEVER)
    ids = mx.where(finite, sample.choose(logits, seen, keys, numbers, rules), NOT_FINITE)
    if rules.penalty:
        seen = seen | (mx.arange(seen.shape[-1]) == ids[:, None])
    return ids, seen, sample.likely(logits, ids, alternatives) if alternatives else ()


def _decode(
    model: GPT,
    choose: Callable[..., tuple[mx.array, mx.array, Telling]],
    rules: Rules,
    alternatives: int,
    length: int,
    ids: mx.array,
    seen: mx.array,
    cache: Cache,
    prompt: Cache,
    position: mx.array,
    keys: mx.array,
    numbers: mx.array,
) -> tuple[mx.array, mx.array, Telling, Cache]:
    """(ids[B], seen, what there is to tell, cache) after the last ids[B], within the cache's first
    `length` places.
    """
    logits, cache = model.decode(ids, cache, position, length, prompt)
    return *choose(rules, alternatives, logits, seen, keys, numbers), cache
