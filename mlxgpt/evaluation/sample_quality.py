"""What a run's generated texts are worth: beside held-out real ones and two controls, measured by
quality.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxgpt.backend import execution
from mlxgpt.config import Sampling
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.token_array import Tokens
from mlxgpt.data.tokenizers.char import NUL, Tokenizer
from mlxgpt.evaluation import text_metrics
from mlxgpt.inference.engine import CompiledModel
from mlxgpt.inference.generate import generate
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import token_losses
from mlxgpt.utils.errors import UserError
from mlxgpt.utils.seeds import derive

logger = logging.getLogger(__name__)

STORIES = 100
LONGEST = 500  # tokens of a story
AT_ONCE = 20
OPENING = "Once upon a time"
WINDOWS, WINDOW = 20, 1000  # texts, and tokens of each, where there are no stories
CONTROL_BYTES = 2_000_000  # of the training text, for the n-gram control
IDS = 1 << 18  # decoded at a time


@dataclass(frozen=True)
class Appraisal:
    """What the texts of a model and of its three neighbours are worth.

    Attributes:
        prompt: what the model's texts began with.
        temperature, seed: how they were drawn.
        columns: for `model`, `real`, `shuffled words` and `n-gram`: metric -> value, None where
            it does not apply.
        order_preference: share of held-out stories that the model finds likelier than the same
            sentences in another order; None where there are no stories.
        texts: the model's.
    """

    prompt: str
    temperature: float
    seed: int
    columns: dict[str, dict[str, float | None]]
    order_preference: float | None
    texts: list[str]


def appraise(
    model: GPT,
    tokenizer: Tokenizer,
    dataset: Dataset,
    *,
    seed: int = 0,
) -> Appraisal:
    """Generate texts, take as many held-out ones and two controls, and measure all of them.

    Raises:
        UserError: if the validation text is too short.
    """
    stories = tokenizer.end_of_text is not None
    prompt = OPENING if stories else ""
    held_out = list(_held_out(dataset.val, tokenizer, seed))
    real = [text for text, _ in held_out]
    if not real:
        raise UserError(
            "the validation text is too short to compare with", "give a longer --val-source."
        )
    logger.info(f"writing {len(real)} texts")
    sampling = Sampling(
        max_tokens=LONGEST - len(tokenizer.encode(prompt)) if stories else WINDOW,
        samples=len(real),
        seed=derive(seed, "appraisal") >> 1,
    )
    compiled = CompiledModel(model, tokenizer.vocab_size)
    bos = tokenizer.end_of_text  # a run that has held-out texts was trained on such
    made = generate(compiled, tokenizer, [prompt], sampling, bos=bos)
    logger.info("reading the training text")
    beginning = "".join(_training(dataset.train, tokenizer, CONTROL_BYTES))
    lengths = [len(text) for text in real]
    ngram = text_metrics.ngram_texts(beginning, lengths, seed)
    shuffled = text_metrics.shuffled_words(real, seed)
    everything = [*real, *made.texts, *shuffled, *ngram]
    known = text_metrics.Known.scan(everything, _training(dataset.train, tokenizer))
    logger.info("measuring")

    def column(of: Sequence[str], ends: Sequence[bool] | None) -> dict[str, float | None]:
        return text_metrics.measure(of, known, ends if stories else None)

    columns = {
        "model": column(made.texts, made.ended),
        "real": column(real, [whole for _, whole in held_out]),
        "shuffled words": column(shuffled, None),
        "n-gram": column(ngram, [len(t) < n for t, n in zip(ngram, lengths, strict=True)]),
    }
    preference = None
    if stories:
        short = [s for s in real if len(tokenizer.encode(s)) < 0.95 * model.config.block_size]

        def score(these: Sequence[str]) -> list[float]:
            return log_likelihoods(model, tokenizer, these)

        preference = text_metrics.order_preference(short, score, seed)
    return Appraisal(prompt, sampling.temperature, seed, columns, preference, made.texts)


def log_likelihoods(model: GPT, tokenizer: Tokenizer, texts: Sequence[str]) -> list[float]:
    """Nats of each text, from its beginning to its end-of-text; a text that is longer than the
    block is cut.
    """
    T = model.config.block_size
    end = tokenizer.end_of_text
    assert end is not None
    score = execution.compiled(lambda x, y, mask: -(token_losses(model(x), y) * mask).sum(axis=1))
    result: list[float] = []
    for start in range(0, len(texts), AT_ONCE):
        rows = [[end, *tokenizer.encode(text), end] for text in texts[start : start + AT_ONCE]]
        ids = np.zeros((AT_ONCE, T + 1), dtype=np.int32)  # one shape, so one trace
        mask = np.zeros((AT_ONCE, T), dtype=np.float32)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = row[: T + 1]
            mask[n, : len(row) - 1] = 1
        scores = score(mx.array(ids[:, :-1]), mx.array(ids[:, 1:]), mx.array(mask))
        result += np.array(scores)[: len(rows)].tolist()
    return result


def _held_out(tokens: Tokens, tokenizer: Tokenizer, seed: int) -> Iterator[tuple[str, bool]]:
    """Some of the validation text: documents, or windows where there is but one; no longer than
    the model's texts may be, each with whether it is whole.
    """
    ids = np.asarray(tokens.ids)
    if tokenizer.end_of_text is None:
        for start in range(0, min(len(ids), WINDOWS * WINDOW) - WINDOW + 1, WINDOW):
            yield tokenizer.decode(ids[start : start + WINDOW].tolist()), False
        return
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    starts = np.concatenate([[0], ends[:-1] + 1])
    order = np.random.Philox(key=derive(seed, "held out")).random_raw(len(ends)).argsort()
    for n in order[:STORIES]:
        own = ids[starts[n] : ends[n]].tolist()
        yield tokenizer.decode(own[:LONGEST]), len(own) <= LONGEST


def _training(tokens: Tokens, tokenizer: Tokenizer, most: int | None = None) -> Iterator[str]:
    """The training text in pieces that end between words, a NUL after each document."""
    pieces = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    if tokenizer.end_of_text is not None:
        pieces[tokenizer.end_of_text] = NUL.encode()
    rest, done = b"", 0
    for start in range(0, len(tokens.ids), IDS):
        ids = tokens.ids[start : start + IDS].tolist()
        text = rest + b"".join(map(pieces.__getitem__, ids))
        at = max(text.rfind(b" "), text.rfind(b"\n"), text.rfind(NUL.encode())) + 1
        rest = text[at:]
        yield text[:at].decode("utf-8", errors="replace")
        done += at
        if most and done > most:
            return
    yield rest.decode("utf-8", errors="replace")
