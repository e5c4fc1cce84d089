"""Prompts -> texts, several in one batch, one of them streamed.

Knows a model and a tokenizer, nothing of runs or terminals.
"""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlxgpt.config import Sampling
from mlxgpt.corpus.normalize import encode_prompt, prompt_text
from mlxgpt.corpus.tokenizer import CharTokenizer, Tokenizer
from mlxgpt.inference.decoding import Decoder, Decoding

AT_ONCE = 64  # texts in one batch, at most
LONGEST_CHARACTER = 4  # bytes in UTF-8, and so tokens, at most


@dataclass(frozen=True)
class Generated:
    """What a generation made.

    Attributes:
        texts: each prompt, as the model read it (normalize.py), with its continuation, `samples`
            of the first, then of the second, …; stop strings and end-of-text are left out.
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


@dataclass(frozen=True)
class Drawn:
    """One token of a text that is being written.

    Attributes:
        text: what is certain by it: nothing in the middle of a character, or of what may become a
            stop string.
        ended: whether the text ended by itself with it.
        probability: that the model gave it, before any setting of sampling; None if not asked for.
        alternatives: (id, probability) of the likeliest, falling.
    """

    id: int
    text: str
    ended: bool
    probability: float | None
    alternatives: list[tuple[int, float]]


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    bos: int | None,
    show: Callable[[str], None] = lambda piece: None,
    note: Callable[[str], None] = lambda line: None,
) -> Generated:
    """Continue prompts, each as if it were alone; on a GPU up to rounding, see decoding.py.

    Args:
        prompts: beginnings; of an empty one, a text from its own beginning. Of one longer than
            the block, the model reads the last tokens.
        sampling: how to draw, and how many texts of each prompt.
        bos: the token that the model's texts begin with; None where they begin without one.
        show: takes pieces of the first text as they are made, the prompt first.
        note: takes a line on what the user should know.

    Raises:
        UserError: if the prompt has characters that the tokenizer lacks.
    """
    sampling = seeded(sampling)
    block = decoder.config.block_size
    prompts = [prompt_text(prompt, tokenizer) for prompt in prompts]
    beginnings = [with_start(tokenizer.encode(prompt), tokenizer, bos) for prompt in prompts]
    for ids in beginnings:
        if len(ids) > block:
            note(f"the prompt has {len(ids):,} tokens; the model reads the last {block:,}")
    rows = [(ids, number) for ids in beginnings for number in range(sampling.samples)]
    texts = [_Text(tokenizer, p, sampling.stop) for p in prompts for _ in range(sampling.samples)]
    show(prompts[0])
    seconds, first_rows = 0.0, 0
    for begin in range(0, len(rows), AT_ONCE):
        batch = slice(begin, begin + AT_ONCE)
        decoding = Decoding(decoder, rows[batch], sampling, tokenizer.end_of_text)
        began = None
        for piece in _written(decoding, texts[batch], texts[0]):
            began = began or time.perf_counter()
            show(piece)
        seconds += time.perf_counter() - (began or 0.0)
        first_rows += len(rows[batch])
    if any(len(ids) + text.tokens > block for (ids, _), text in zip(rows, texts, strict=True)):
        note(
            f"beyond {block:,} tokens the model goes on from the last "
            + (f"{block:,}" if decoder.slides else f"{block // 2:,} to {block:,}")
            + ", and has forgotten what was before"
        )
    tokens = sum(text.tokens for text in texts)
    rate = (tokens - first_rows) / seconds if tokens > first_rows else 0.0
    ended = [text.ended for text in texts]
    seed = sampling.seed or 0
    return Generated([text.text for text in texts], seed, tokens, rate, ended)


def stream(
    decoder: Decoder, tokenizer: Tokenizer, prompt: str, sampling: Sampling, *, bos: int | None
) -> Iterator[str]:
    """Continue one prompt: pieces of the continuation as they are made. See `generate`."""
    ids = with_start(encode_prompt(prompt, tokenizer), tokenizer, bos)
    for drawn in tokens(decoder, tokenizer, ids, sampling):
        if drawn.text:
            yield drawn.text


def tokens(
    decoder: Decoder,
    tokenizer: Tokenizer,
    ids: np.ndarray,
    sampling: Sampling,
    *,
    number: int = 0,
    alternatives: int = 0,
) -> Iterator[Drawn]:
    """Continue a prompt's ids, at least one, token by token, as `generate` would.

    Args:
        number: which one of several samples it is.
        alternatives: of how many of the likeliest tokens is told at each place.
    """
    text = _Text(tokenizer, "", sampling.stop)
    text.follow(ids)
    sampling = seeded(sampling)
    decoding = Decoding(decoder, [(ids, number)], sampling, tokenizer.end_of_text, alternatives)
    for n, (id,) in enumerate(decoding, 1):
        piece = text.add(id)
        if n == sampling.max_tokens and not text.ended:
            piece += text.rest()
        told: tuple[float | None, list] = (None, [])
        if decoding.told:
            (probability,), (others,), (theirs,) = decoding.told
            told = probability, list(zip(others, theirs, strict=True))
        yield Drawn(id, piece, text.ended, *told)
        if text.ended:
            return


def seeded(sampling: Sampling) -> Sampling:
    """With a fresh seed where it has none."""
    if sampling.seed is not None:
        return sampling
    return replace(sampling, seed=secrets.randbelow(1 << 31))


def _written(decoding: Decoding, texts: list[_Text], shown: _Text) -> Iterator[str]:
    """Write a batch's texts to their ends; after each row, and at the end, what is new of one."""
    for row in decoding:
        new = ""
        for text, id in zip(texts, row, strict=True):
            if not text.ended:
                piece = text.add(id)
                new = piece if text is shown else new
        yield new
        left = [n for n, text in enumerate(texts) if not text.ended]
        if not left:
            return
        if len(left) <= len(texts) // 2:
            decoding.keep(left)
            texts = [texts[n] for n in left]
    new = ""
    for text in texts:
        if not text.ended:
            piece = text.rest()
            new = piece if text is shown else new
    yield new


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
    if isinstance(tokenizer, CharTokenizer) and "\n" not in tokenizer.characters:
        return tokenizer.encode(tokenizer.characters[0])
    return tokenizer.encode("\n")


class _Text:
    """One growing text: bytes become characters, and what may be the beginning of a stop string
    is held back until it is certain.

    Attributes:
        text: so far.
        tokens: how many were drawn for it.
        ended: whether it ended by itself.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, stop: tuple[str, ...]) -> None:
        self.text, self.tokens, self.ended = prompt, 0, False
        self._tokenizer = tokenizer
        # As the model writes: it has no CR, and may know one Unicode form only.
        self._stop = [s for s in (prompt_text(s, tokenizer) for s in stop) if s]
        self._held = ""
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def follow(self, ids: np.ndarray) -> None:
        """Go on in the middle of a character, where a prompt's ids end there."""
        for id in ids[-LONGEST_CHARACTER:].tolist():
            self._decode(self._tokenizer.token_bytes(id))

    def add(self, id: int) -> str:
        """Take one more token; returns the text that is certain by it."""
        self.tokens += 1
        if id == self._tokenizer.end_of_text:
            self.ended = True
            return self.rest()
        self._held += self._decode(self._tokenizer.token_bytes(id))
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.ended = True
            piece = self._release(min(found))
            self._held = ""
            return piece
        longest = max((_overlap(self._held, s) for s in self._stop), default=0)
        return self._release(len(self._held) - longest)

    def rest(self) -> str:
        """No more tokens: returns what was held back."""
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
