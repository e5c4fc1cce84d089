"""Text generation from prompts, in batches, with streaming of the first text.

Does not depend on runs or the command line.
"""

from __future__ import annotations

import codecs
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlxgpt.config import SamplingParams
from mlxgpt.data.normalize import normalize_prompt
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.inference.decode import BatchDecoder, generate_step
from mlxgpt.inference.engine import CompiledModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationOutput:
    """Generated texts.

    Attributes:
        texts: each normalized prompt with its continuation, all samples of the first prompt, then
            of the second, …; without stop strings and end-of-text.
        seed: seed that reproduces the texts.
        tokens: total number of generated tokens.
        tokens_per_second: decoding speed, over all texts, without prefill.
        ended: for each text, whether it ended before the maximum length.
    """

    texts: list[str]
    seed: int
    tokens: int
    tokens_per_second: float
    ended: list[bool]


@dataclass(frozen=True)
class TokenOutput:
    """One generated token.

    Attributes:
        text: text that this token completes; empty within a multi-byte character or a possible stop
            string.
        ended: whether the text ended with it, before the maximum length.
        probability: the model's probability, without sampling parameters; None if not requested.
        alternatives: (id, probability) of the most likely tokens, in descending order.
    """

    id: int
    text: str
    ended: bool
    probability: float | None
    alternatives: list[tuple[int, float]]


MAX_BATCH_SIZE = 64  # texts


class TextStream:
    """Generates texts, and streams the first one: iterate once for its pieces; then `result` has
    all texts. A text does not depend on its batch (on a GPU up to rounding, see decode.py).

    Args:
        prompts: texts to continue; an empty one generates a new text. The model only sees the last
            block_size tokens.
        sampling: sampling parameters, including the number of samples per prompt.
        bos: start token of the model's texts; None if they have none.

    Attributes:
        prompt: the first prompt, normalized; it is not part of the streamed pieces.

    Raises:
        UserError: if a prompt has characters that the tokenizer cannot encode.
    """

    def __init__(
        self,
        model: CompiledModel,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        sampling: SamplingParams,
        *,
        bos: int | None,
    ) -> None:
        self._model, self._sampling = model, ensure_seed(sampling)
        self._end_of_text = tokenizer.end_of_text
        # For each text: (prompt ids, sample index).
        self._prompts: list[tuple[np.ndarray, int]] = []
        self._detokenizers: list[Detokenizer] = []
        for prompt in (normalize_prompt(prompt, tokenizer) for prompt in prompts):
            ids = prepend_bos(tokenizer.encode(prompt), tokenizer, bos)
            for sample_index in range(sampling.samples):
                self._prompts.append((ids, sample_index))
                self._detokenizers.append(Detokenizer(tokenizer, prompt, sampling.stop))
        self.prompt = self._detokenizers[0].text
        self._decode_seconds = 0.0  # without the first row of each batch, which includes prefill

    def __iter__(self) -> Iterator[str]:
        """Generate all texts, and yield pieces of the first one.

        Raises:
            NotFiniteError: if the model's logits are not finite.
        """
        self._log_long_prompts()
        for start in range(0, len(self._prompts), MAX_BATCH_SIZE):
            batch_prompts = self._prompts[start : start + MAX_BATCH_SIZE]
            detokenizers = self._detokenizers[start : start + MAX_BATCH_SIZE]
            batch = BatchDecoder(self._model, batch_prompts, self._sampling, self._end_of_text)
            decode_start = None
            for row in generate_step(batch):
                decode_start = decode_start or time.perf_counter()
                if piece := self._add(detokenizers, row):
                    yield piece
                active = [n for n, detokenizer in enumerate(detokenizers) if not detokenizer.ended]
                if not active:
                    break
                if len(active) <= len(detokenizers) // 2:
                    batch.filter_rows(active)
                    detokenizers = [detokenizers[n] for n in active]
            if piece := self._finish(detokenizers):
                yield piece
            self._decode_seconds += time.perf_counter() - (decode_start or 0.0)

    @property
    def result(self) -> GenerationOutput:
        """All texts generated so far."""
        detokenizers = self._detokenizers
        tokens = sum(detokenizer.tokens for detokenizer in detokenizers)
        seconds = self._decode_seconds
        tokens_per_second = (tokens - len(detokenizers)) / seconds if seconds else 0.0
        return GenerationOutput(
            [detokenizer.text for detokenizer in detokenizers],
            self._sampling.seed or 0,
            tokens,
            tokens_per_second,
            [detokenizer.ended for detokenizer in detokenizers],
        )

    def _add(self, detokenizers: list[Detokenizer], row: list[int]) -> str:
        """Add a token to each text that has not ended; returns the new part of the first text."""
        pieces = {
            detokenizer: detokenizer.add_token(id)
            for detokenizer, id in zip(detokenizers, row, strict=True)
            if not detokenizer.ended
        }
        return pieces.get(self._detokenizers[0], "")

    def _finish(self, detokenizers: list[Detokenizer]) -> str:
        """Finish the texts that have not ended; returns the new part of the first text."""
        pieces = {
            detokenizer: detokenizer.finalize()
            for detokenizer in detokenizers
            if not detokenizer.ended
        }
        return pieces.get(self._detokenizers[0], "")

    def _log_long_prompts(self) -> None:
        block_size = self._model.config.block_size
        for ids, sample_index in self._prompts:
            if sample_index == 0 and len(ids) > block_size:
                logger.info(
                    f"the prompt has {len(ids):,} tokens; the model only sees the last "
                    f"{block_size:,}"
                )

    def log_long_texts(self) -> None:
        """After generation, log if texts are longer than the model's context."""
        block_size = self._model.config.block_size
        pairs = zip(self._prompts, self._detokenizers, strict=True)
        if any(len(ids) + detokenizer.tokens > block_size for (ids, _), detokenizer in pairs):
            context = f"{block_size:,}"
            if not self._model.supports_sliding_window:
                context = f"{block_size // 2:,} to {context}"
            logger.info(
                f"the text is longer than the block size of {block_size:,} tokens: the model only "
                f"sees the last {context}"
            )


def generate_texts(
    model: CompiledModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingParams,
    *,
    bos: int | None,
) -> GenerationOutput:
    """Continue prompts in batches, without streaming; see `TextStream`."""
    stream = TextStream(model, tokenizer, prompts, sampling, bos=bos)
    for _ in stream:
        pass
    return stream.result


def stream_tokens(
    model: CompiledModel,
    tokenizer: Tokenizer,
    ids: np.ndarray,
    sampling: SamplingParams,
    *,
    sample_index: int = 0,
    top_count: int = 0,
) -> Iterator[TokenOutput]:
    """Continue a prompt of at least one id, and yield each token; same tokens as `generate_texts`.

    Args:
        sample_index: index of the sample among several of the same prompt.
        top_count: how many of the most likely tokens to return with each token.
    """
    detokenizer = Detokenizer(tokenizer, "", sampling.stop)
    detokenizer.feed_prompt(ids)
    prompts = [(ids, sample_index)]
    batch = BatchDecoder(model, prompts, ensure_seed(sampling), tokenizer.end_of_text, top_count)
    for n, (id,) in enumerate(generate_step(batch), 1):
        piece = detokenizer.add_token(id)
        if n == sampling.max_tokens and not detokenizer.ended:
            piece += detokenizer.finalize()
        probability, alternatives = None, list[tuple[int, float]]()
        if batch.probabilities:
            (probability,), (top_ids,), (top_probs,) = batch.probabilities
            alternatives = list(zip(top_ids, top_probs, strict=True))
        yield TokenOutput(id, piece, detokenizer.ended, probability, alternatives)
        if detokenizer.ended:
            return


def ensure_seed(sampling: SamplingParams) -> SamplingParams:
    """The sampling parameters, with a random seed if they have none."""
    if sampling.seed is not None:
        return sampling
    return replace(sampling, seed=secrets.randbelow(1 << 31))


def prepend_bos(ids: np.ndarray, tokenizer: Tokenizer, bos: int | None) -> np.ndarray:
    """Prepend `bos`, if the model has one, to prompt ids. Otherwise an empty prompt becomes an
    end-of-text token, or a newline if there is none, as before a new paragraph.
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


MAX_UTF8_BYTES = 4  # per character, so also the maximum number of tokens per character


class Detokenizer:
    """Streaming decoder of one text's tokens. Delays incomplete UTF-8 characters and anything that
    could be the start of a stop string.

    Attributes:
        text: the prompt and the text released so far.
        tokens: number of generated tokens.
        ended: whether the text ended before the maximum length.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, stop: tuple[str, ...]) -> None:
        self.text, self.tokens, self.ended = prompt, 0, False
        self._tokenizer = tokenizer
        # Normalized as the training text: no CR, and possibly a single Unicode form.
        self._stop = [s for s in (normalize_prompt(s, tokenizer) for s in stop) if s]
        self._pending = ""
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def feed_prompt(self, ids: np.ndarray) -> None:
        """Feed the end of a prompt to the decoder, in case it stops within a UTF-8 character."""
        for id in ids[-MAX_UTF8_BYTES:].tolist():
            self._decode(self._tokenizer.token_bytes(id))

    def add_token(self, id: int) -> str:
        """Add a token, and return the text that it completes."""
        self.tokens += 1
        if id == self._tokenizer.end_of_text:
            self.ended = True
            return self.finalize()
        self._pending += self._decode(self._tokenizer.token_bytes(id))
        stop_positions = [position for s in self._stop if (position := self._pending.find(s)) >= 0]
        if stop_positions:
            self.ended = True
            piece = self._release(min(stop_positions))
            self._pending = ""
            return piece
        overlap = max((_overlap(self._pending, s) for s in self._stop), default=0)
        return self._release(len(self._pending) - overlap)

    def finalize(self) -> str:
        """End the text, and return the delayed rest."""
        self._pending += self._decode(b"", True)
        return self._release(len(self._pending))

    def _release(self, count: int) -> str:
        piece, self._pending = self._pending[:count], self._pending[count:]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    max_length = min(len(text), len(stop) - 1)
    return next((n for n in range(max_length, 0, -1) if stop.startswith(text[-n:])), 0)
