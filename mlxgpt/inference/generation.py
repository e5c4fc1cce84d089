"""Prompt -> text: prefill, cache, decoding step by step, streaming, several texts in one batch.

Knows a model and a tokenizer, nothing of runs or terminals.
"""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np

from mlxgpt.config import Sampling
from mlxgpt.corpus.tokenizer import CharTokenizer, Tokenizer
from mlxgpt.inference import sample
from mlxgpt.machine.compiler import compiled
from mlxgpt.model.gpt import GPT, Cache
from mlxgpt.seeds import derive

SMALLEST_BUCKET = 16
SMALLEST_CACHE = 128  # tokens; doubled whenever it is full, up to the block


@dataclass(frozen=True)
class Generated:
    """What a generation made.

    Attributes:
        texts: each prompt with its continuation; stop strings and end-of-text are left out.
        seed: the seed that makes the same texts again.
        tokens: how many were drawn, over all texts.
        tokens_per_second: of drawing them, the prompt's prefill left out.
        ended: for each text, whether it ended by itself, before the greatest length.
    """

    texts: list[str]
    seed: int
    tokens: int
    tokens_per_second: float
    ended: list[bool]


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    *,
    bos: int | None,
    stream: Callable[[str], None] | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Generated:
    """Continue a prompt.

    Args:
        prompt: the beginning; if empty, a text from its own beginning. Of one longer than the
            block, the model reads the last tokens.
        sampling: how to draw; `samples` texts are made in one batch.
        bos: the token that the model's texts begin with; None where they begin without one.
        stream: takes pieces of the first text as they are made, the prompt first.
        note: takes a line on what the user should know.

    Raises:
        UserError: if the prompt has characters that the tokenizer lacks.
    """
    if sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbelow(1 << 31))
    assert sampling.seed is not None
    ids = tokenizer.encode(prompt)
    if len(ids) > model.config.block_size:
        note(
            f"the prompt has {len(ids):,} tokens; "
            f"the model reads the last {model.config.block_size:,}"
        )
    texts = [_Text(prompt, sampling.stop) for _ in range(sampling.samples)]
    emit = stream or (lambda piece: None)
    emit(prompt)
    drawn, started = 0, time.perf_counter()
    start = with_start(ids, tokenizer, bos)
    for row in tokens(model, start, sampling, tokenizer.vocab_size, tokenizer.end_of_text):
        if drawn == 0:
            started = time.perf_counter()
        for text, id in zip(texts, row, strict=True):
            if text.done:
                continue
            drawn += 1
            piece = text.end() if id == tokenizer.end_of_text else text.add(tokenizer, id)
            if text is texts[0]:
                emit(piece)
        if all(text.done for text in texts):
            break
    ended = [text.done for text in texts]
    for text in texts:
        piece = text.end()
        if text is texts[0]:
            emit(piece)
    seconds = time.perf_counter() - started
    rate = (drawn - sampling.samples) / seconds if drawn > sampling.samples else 0.0
    return Generated([text.text for text in texts], sampling.seed, drawn, rate, ended)


def with_start(ids: np.ndarray, tokenizer: Tokenizer, bos: int | None) -> np.ndarray:
    """Prompt ids as the model saw texts begin: after `bos` where there is one. Without, an empty
    prompt becomes an end-of-text, or where there is none a newline, as lies between two paragraphs.
    """
    if bos is not None:
        return np.concatenate([[bos], ids])
    if len(ids):
        return ids
    if tokenizer.end_of_text is not None:
        return np.array([tokenizer.end_of_text])
    assert isinstance(tokenizer, CharTokenizer)  # the others have an end-of-text
    return tokenizer.encode("\n" if "\n" in tokenizer.characters else tokenizer.characters[0])


def tokens(
    model: GPT,
    prompt: np.ndarray,
    sampling: Sampling,
    vocab_size: int,
    end_of_text: int | None = None,
) -> Iterator[list[int]]:
    """Yield `max_tokens` rows of one new id for each sample, all below `vocab_size`: a model may
    have room for more ids than its tokenizer gives.

    The next row is under way on the device while the last one is read. A full cache slides, where
    the model can: see `GPT.slides`. With learned positions its last half is read in again instead,
    from position 0.
    """
    block, samples = model.config.block_size, sampling.samples
    seed = sampling.seed or 0
    window = np.tile(np.asarray(prompt[-block:], dtype=np.int32), (samples, 1))  # [B, T]
    seen = np.zeros((samples, model.config.vocab_size), dtype=bool)
    seen[:, prompt[prompt != end_of_text]] = True  # to end is no repetition of having begun
    decoder = Decoder(model, sampling, vocab_size)

    def key(n: int) -> mx.array:
        return mx.random.key(derive(seed, "sample", n))

    decoder.prefill(window)
    ids = decoder.draw(mx.array(seen), key(0))
    for n in range(1, sampling.max_tokens + 1):
        more = n < sampling.max_tokens
        full = decoder.position == block and not model.slides
        following = decoder.step(key(n)) if more and not full else ids
        row = np.array(ids, dtype=np.int32)  # waits for it, while the following is under way
        window = np.concatenate([window, row[:, None]], axis=1)[:, -block:]
        if more and full:
            decoder.prefill(window[:, -max(1, block // 2) :])
            following = decoder.draw(decoder.seen, key(n))
        yield row.tolist()
        ids = following


class Decoder:
    """The compiled decoding of one batch: prefill by bucket, then one token at a time. Each is
    traced once for each length of the cache: once for Tier 1's block, at most four times for
    GPT-2's.

    Attributes:
        position: tokens read and drawn; the cache holds the last of them.
        seen: bool [B, V], which tokens were there, for the repetition penalty.
    """

    def __init__(self, model: GPT, sampling: Sampling, vocab_size: int) -> None:
        self.block_size = model.config.block_size
        self.position = 0
        self.seen = mx.zeros((sampling.samples, model.config.vocab_size), dtype=mx.bool_)
        self._cache: Cache = []
        self._logits = mx.zeros((sampling.samples, model.config.vocab_size))
        self._ids = mx.zeros((sampling.samples,), dtype=mx.int32)
        choose = partial(_choose, sampling=sampling, vocab_size=vocab_size)
        # Functions that do not know this object: with a cycle it would outlive its use, and its
        # arrays would leave the memory around them in pieces.
        self._forward = compiled(partial(_forward, model))
        self._draw = compiled(choose)
        self._step = compiled(partial(_forward_and_choose, model, choose))

    def prefill(self, window: np.ndarray) -> None:
        """Read ids[B, T] in from position 0, padded to the next bucket: the padding stands after
        them, where no position looks before it is overwritten.
        """
        length = window.shape[1]
        bucket = SMALLEST_BUCKET
        while bucket < length:
            bucket *= 2
        bucket = min(bucket, self.block_size)
        padded = np.zeros((window.shape[0], bucket), dtype=np.int32)
        padded[:, :length] = window
        self._cache = []  # before there is another
        self._logits, self._cache = self._forward(mx.array(padded), mx.array([length - 1]))
        self.position = length

    def draw(self, seen: mx.array, key: mx.array) -> mx.array:
        """The first ids[B] after a prefill."""
        self._ids, self.seen = self._draw(self._logits, seen, key)
        mx.async_eval(self._ids, self.seen, self._cache)
        return self._ids

    def step(self, key: mx.array) -> mx.array:
        """The ids[B] after the last ones drawn."""
        length = self._cache[0][0].shape[2]
        if self.position == length < self.block_size:
            self._grow(min(2 * length, self.block_size))
        self._ids, self.seen, self._cache = self._step(
            self._ids, self.seen, self._cache, mx.array([self.position]), key
        )
        self.position += 1
        mx.async_eval(self._ids, self.seen, self._cache)
        return self._ids

    def _grow(self, length: int) -> None:
        padding = [(0, 0), (0, 0), (0, length - self.position), (0, 0)]
        self._cache = [(mx.pad(k, padding), mx.pad(v, padding)) for k, v in self._cache]


def _choose(
    logits: mx.array, seen: mx.array, key: mx.array, *, sampling: Sampling, vocab_size: int
) -> tuple[mx.array, mx.array]:
    """(ids[B], seen with them) from logits[B, V]."""
    known = mx.arange(logits.shape[-1]) < vocab_size
    logits = mx.where(known, logits, sample.NEVER)
    ids = sample.draw(sample.process(logits, seen, sampling), key)
    return ids, seen | (mx.arange(seen.shape[-1]) == ids[:, None])


def _forward(model: GPT, ids: mx.array, last: mx.array) -> tuple[mx.array, Cache]:
    """Logits[B, V] after the token at index `last` of ids[B, T], and a cache that holds them."""
    B, T = ids.shape
    # Made in here, so that it is filled in place.
    cache = model.empty_cache(B, min(max(T, SMALLEST_CACHE), model.config.block_size))
    return model.cached(ids, cache, mx.array([0]), last)


def _forward_and_choose(
    model: GPT,
    choose: Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]],
    ids: mx.array,
    seen: mx.array,
    cache: Cache,
    position: mx.array,
    key: mx.array,
) -> tuple[mx.array, mx.array, Cache]:
    """(ids[B], seen, cache) after the last ids[B]."""
    logits, cache = model.cached(ids[:, None], cache, position, mx.array([0]))
    ids, seen = choose(logits, seen, key)
    return ids, seen, cache


class _Text:
    """One growing text: bytes become characters, and what may be the beginning of a stop string
    is held back until it is certain.
    """

    def __init__(self, prompt: str, stop: tuple[str, ...]) -> None:
        self.text = prompt
        self.done = False
        self._stop = [s for s in stop if s]
        self._held = ""
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def add(self, tokenizer: Tokenizer, id: int) -> str:
        """Take one more token; returns the text that is certain by it."""
        self._held += self._decode(tokenizer.token_bytes(id))
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.done = True
            return self._release(min(found))
        longest = max((_overlap(self._held, s) for s in self._stop), default=0)
        return self._release(len(self._held) - longest)

    def end(self) -> str:
        """No more tokens: returns what was held back."""
        if self.done:
            return ""
        self.done = True
        self._held += self._decode(b"", True)
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
