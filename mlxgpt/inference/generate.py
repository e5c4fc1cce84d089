"""Prompts -> texts, several in one batch, the first of them streamed.

Knows a model and a tokenizer, nothing of runs or terminals.
"""

from __future__ import annotations

import codecs
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlxgpt.config import Sampling
from mlxgpt.data.normalize import prompt_text
from mlxgpt.data.tokenizers.char import CharTokenizer, Tokenizer
from mlxgpt.inference.decode import BatchDecoder, generate_step
from mlxgpt.inference.engine import CompiledModel

logger = logging.getLogger(__name__)

BATCH_SIZE = 64  # texts in one batch, at most
LONGEST_CHARACTER = 4  # bytes in UTF-8, and so tokens, at most


@dataclass(frozen=True)
class Generated:
    """Generated texts.

    Attributes:
        texts: each prompt, as the model read it (normalize.py), with its continuation, `samples`
            of the first, then of the second, …; stop strings and end-of-text are left out.
        seed: the seed that makes the same texts again.
        tokens: how many were drawn, over all texts.
        tokens_per_second: of drawing them, the prompt's prefill left out.
        ended: for each text, whether it ended before the greatest length.
    """

    texts: list[str]
    seed: int
    tokens: int
    tokens_per_second: float
    ended: list[bool]


@dataclass(frozen=True)
class TokenOutput:
    """One token of a text that is being generated.

    Attributes:
        text: what is certain by it: nothing in the middle of a character, or of what may become a
            stop string.
        ended: whether the text ended with it, before the greatest length.
        probability: that the model gave it, before any setting of sampling; None if not asked for.
        alternatives: (id, probability) of the likeliest, falling.
    """

    id: int
    text: str
    ended: bool
    probability: float | None
    alternatives: list[tuple[int, float]]


class TextStream:
    """Texts that are being generated. Iterate over it, once, for the pieces of the first one; then
    `result` has all of them. Each is drawn as if it were alone; on a GPU up to rounding, see
    decode.py.

    Args:
        prompts: beginnings; of an empty one, a text from its own beginning. Of one longer than
            the block, the model reads the last tokens.
        sampling: how to draw, and how many texts of each prompt.
        bos: the token that the model's texts begin with; None where they begin without one.

    Attributes:
        prompt: the first one, as the model reads it; it is not among the pieces.

    Raises:
        UserError: if a prompt has characters that the tokenizer lacks.
    """

    def __init__(
        self,
        model: CompiledModel,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        bos: int | None,
    ) -> None:
        self._model, self._sampling = model, seeded(sampling)
        self._end_of_text = tokenizer.end_of_text
        # Of each text its prompt's ids, and which of that prompt's samples it is.
        self._rows: list[tuple[np.ndarray, int]] = []
        self._texts: list[Detokenizer] = []
        for prompt in (prompt_text(prompt, tokenizer) for prompt in prompts):
            ids = with_start(tokenizer.encode(prompt), tokenizer, bos)
            for number in range(sampling.samples):
                self._rows.append((ids, number))
                self._texts.append(Detokenizer(tokenizer, prompt, sampling.stop))
        self.prompt = self._texts[0].text
        self._seconds = 0.0  # of all rows of new ids but the first one of each batch

    def __iter__(self) -> Iterator[str]:
        """Pieces of the first text.

        Raises:
            NotFiniteError: where the model's logits are not finite.
        """
        self._log_long_prompts()
        for start in range(0, len(self._rows), BATCH_SIZE):
            rows = self._rows[start : start + BATCH_SIZE]
            texts = self._texts[start : start + BATCH_SIZE]
            batch = BatchDecoder(self._model, rows, self._sampling, self._end_of_text)
            began = None
            for row in generate_step(batch):
                began = began or time.perf_counter()
                if piece := self._add(texts, row):
                    yield piece
                going = [n for n, text in enumerate(texts) if not text.ended]
                if not going:
                    break
                if len(going) <= len(texts) // 2:
                    batch.keep(going)
                    texts = [texts[n] for n in going]
            if piece := self._finish(texts):
                yield piece
            self._seconds += time.perf_counter() - (began or 0.0)

    @property
    def result(self) -> Generated:
        """The texts, as far as they are generated."""
        texts = self._texts
        tokens = sum(text.tokens for text in texts)
        rate = (tokens - len(texts)) / self._seconds if self._seconds else 0.0
        return Generated(
            [text.text for text in texts],
            self._sampling.seed or 0,
            tokens,
            rate,
            [text.ended for text in texts],
        )

    def _add(self, texts: list[Detokenizer], row: list[int]) -> str:
        """Add a token to each text that did not end; what is new of the first one of all."""
        pieces = {text: text.add(id) for text, id in zip(texts, row, strict=True) if not text.ended}
        return pieces.get(self._texts[0], "")

    def _finish(self, texts: list[Detokenizer]) -> str:
        """No more tokens for these; what is new of the first one of all."""
        pieces = {text: text.finish() for text in texts if not text.ended}
        return pieces.get(self._texts[0], "")

    def _log_long_prompts(self) -> None:
        block = self._model.config.block_size
        for ids, number in self._rows:
            if number == 0 and len(ids) > block:
                logger.info(
                    f"the prompt has {len(ids):,} tokens; the model reads the last {block:,}"
                )

    def log_long_texts(self) -> None:
        """After the last piece: log what the model has forgotten of texts longer than its block."""
        block = self._model.config.block_size
        rows = zip(self._rows, self._texts, strict=True)
        if any(len(ids) + text.tokens > block for (ids, _), text in rows):
            kept = f"{block:,}" if self._model.slides else f"{block // 2:,} to {block:,}"
            logger.info(
                f"beyond {block:,} tokens the model continues from the last {kept}, and has "
                "forgotten what was before"
            )


def generate(
    model: CompiledModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    bos: int | None,
) -> Generated:
    """Continue prompts, several in one batch: see `TextStream`."""
    stream = TextStream(model, tokenizer, prompts, sampling, bos=bos)
    for _ in stream:
        pass
    return stream.result


def stream_tokens(
    model: CompiledModel,
    tokenizer: Tokenizer,
    ids: np.ndarray,
    sampling: Sampling,
    *,
    number: int = 0,
    top: int = 0,
) -> Iterator[TokenOutput]:
    """Continue a prompt's ids, at least one, token by token, as `generate` would.

    Args:
        number: which one of several samples it is.
        top: how many of the likeliest tokens come with each one.
    """
    text = Detokenizer(tokenizer, "", sampling.stop)
    text.follow(ids)
    rows = [(ids, number)]
    batch = BatchDecoder(model, rows, seeded(sampling), tokenizer.end_of_text, top)
    for n, (id,) in enumerate(generate_step(batch), 1):
        piece = text.add(id)
        if n == sampling.max_tokens and not text.ended:
            piece += text.finish()
        probability, alternatives = None, list[tuple[int, float]]()
        if batch.probabilities:
            (probability,), (top_ids,), (top_probabilities,) = batch.probabilities
            alternatives = list(zip(top_ids, top_probabilities, strict=True))
        yield TokenOutput(id, piece, text.ended, probability, alternatives)
        if text.ended:
            return


def seeded(sampling: Sampling) -> Sampling:
    """With a fresh seed where it has none."""
    if sampling.seed is not None:
        return sampling
    return replace(sampling, seed=secrets.randbelow(1 << 31))


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


class Detokenizer:
    """One growing text: bytes become characters, and what may be the beginning of a stop string
    is kept until it is certain.

    Attributes:
        text: so far.
        tokens: how many were drawn for it.
        ended: whether it ended before the greatest length.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, stop: tuple[str, ...]) -> None:
        self.text, self.tokens, self.ended = prompt, 0, False
        self._tokenizer = tokenizer
        # As the model writes: it has no CR, and may know one Unicode form only.
        self._stop = [s for s in (prompt_text(s, tokenizer) for s in stop) if s]
        self._held = ""
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def follow(self, ids: np.ndarray) -> None:
        """Continue in the middle of a character, where a prompt's ids end there."""
        for id in ids[-LONGEST_CHARACTER:].tolist():
            self._decode(self._tokenizer.token_bytes(id))

    def add(self, id: int) -> str:
        """Take one more token; returns the text that is certain by it."""
        self.tokens += 1
        if id == self._tokenizer.end_of_text:
            self.ended = True
            return self.finish()
        self._held += self._decode(self._tokenizer.token_bytes(id))
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.ended = True
            piece = self._release(min(found))
            self._held = ""
            return piece
        longest = max((_overlap(self._held, s) for s in self._stop), default=0)
        return self._release(len(self._held) - longest)

    def finish(self) -> str:
        """No more tokens: returns the text that was not certain."""
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
