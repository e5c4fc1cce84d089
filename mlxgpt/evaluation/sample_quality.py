"""Sample quality: metrics of generated texts, compared with held-out texts and two controls. The
metrics are in text_metrics.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxgpt.backend import execution
from mlxgpt.config import SamplingParams
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.example_array import ExampleArray, SplitArray
from mlxgpt.data.tokenizers.base import NUL, Tokenizer
from mlxgpt.evaluation import text_metrics
from mlxgpt.inference.engine import CompiledModel
from mlxgpt.inference.generate import generate_texts
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import answer_logprobs, token_losses
from mlxgpt.utils.errors import UserError
from mlxgpt.utils.seeds import derive_seed

logger = logging.getLogger(__name__)

QUALITY_FORMAT = 1  # of a run's quality.json; the first ones had no `format`
MAX_STORY_TOKENS = 500
WINDOW_TOKENS = 1000  # length of each text in data without end-of-text


@dataclass(frozen=True)
class SampleQuality:
    """Metrics of a model's samples, of held-out texts and of two controls.

    Attributes:
        prompt: prompt of the samples.
        temperature, seed: sampling parameters of the samples.
        columns: `model`, `real`, `shuffled words` and `n-gram`, each a map from metric to value, or
            None if the metric does not apply.
        order_preference: see `text_metrics.order_preference`; None without stories.
        texts: the samples.
    """

    prompt: str
    temperature: float
    seed: int
    columns: dict[str, dict[str, float | None]]
    order_preference: float | None
    texts: list[str]


STORY_PROMPT = "Once upon a time"
NGRAM_TRAINING_BYTES = 2_000_000  # of training text for the n-gram control


def measure_sample_quality(
    model: GPT,
    tokenizer: Tokenizer,
    dataset: Dataset,
    *,
    seed: int = 0,
) -> SampleQuality:
    """Generate samples, and measure them along with as many held-out texts and two controls.

    Raises:
        UserError: if the validation text is too short.
    """
    if isinstance(dataset.train, ExampleArray) or isinstance(dataset.val, ExampleArray):
        raise UserError(
            f"{dataset.folder} contains prompts and answers, and the quality of texts is measured",
            "use the run that it was fine-tuned from.",
        )
    has_stories = tokenizer.end_of_text is not None
    prompt = STORY_PROMPT if has_stories else ""
    held_out = list(_sample_held_out(dataset.val, tokenizer, seed))
    real = [text for text, _ in held_out]
    if not real:
        raise UserError(
            "the validation text is too short for a comparison", "use a longer --val-source."
        )
    logger.info(f"generating {len(real)} samples")
    max_tokens = WINDOW_TOKENS
    if has_stories:
        max_tokens = MAX_STORY_TOKENS - len(tokenizer.encode(prompt))
    sampling = SamplingParams(
        max_tokens=max_tokens,
        samples=len(real),
        seed=derive_seed(seed, "appraisal") >> 1,
    )
    compiled = CompiledModel(model, tokenizer.vocab_size)
    bos = tokenizer.end_of_text  # each training document follows one
    generated = generate_texts(compiled, tokenizer, [prompt], sampling, bos=bos)
    logger.info("scanning the training text")
    ngram_corpus = "".join(_decode_training_text(dataset.train, tokenizer, NGRAM_TRAINING_BYTES))
    lengths = [len(text) for text in real]
    ngram = text_metrics.sample_ngram_texts(ngram_corpus, lengths, seed)
    shuffled = text_metrics.shuffle_words(real, seed)
    all_texts = [*real, *generated.texts, *shuffled, *ngram]
    training_pieces = _decode_training_text(dataset.train, tokenizer)
    overlap = text_metrics.TrainingOverlap.scan(all_texts, training_pieces)
    logger.info("measuring")

    def measure_column(
        texts: Sequence[str], ended: Sequence[bool] | None
    ) -> dict[str, float | None]:
        return text_metrics.compute_metrics(texts, overlap, ended if has_stories else None)

    columns = {
        "model": measure_column(generated.texts, generated.ended),
        "real": measure_column(real, [is_complete for _, is_complete in held_out]),
        "shuffled words": measure_column(shuffled, None),
        "n-gram": measure_column(ngram, [len(t) < n for t, n in zip(ngram, lengths, strict=True)]),
    }
    preference = None
    if has_stories:
        max_length = 0.95 * model.config.block_size
        short_stories = [story for story in real if len(tokenizer.encode(story)) < max_length]

        def score(texts: Sequence[str]) -> list[float]:
            return log_likelihoods(model, tokenizer, texts)

        preference = text_metrics.order_preference(short_stories, score, seed)
    return SampleQuality(prompt, sampling.temperature, seed, columns, preference, generated.texts)


SCORING_BATCH_SIZE = 20


def log_likelihoods(model: GPT, tokenizer: Tokenizer, texts: Sequence[str]) -> list[float]:
    """Log-likelihood of each text in nats, including its end-of-text token. Texts longer than the
    block size are truncated.
    """
    T = model.config.block_size
    eot_id = tokenizer.end_of_text
    assert eot_id is not None
    score = execution.compile_function(
        lambda x, y, mask: answer_logprobs(token_losses(model(x), y), mask)
    )
    result: list[float] = []
    for start in range(0, len(texts), SCORING_BATCH_SIZE):
        rows = [
            [eot_id, *tokenizer.encode(text), eot_id]
            for text in texts[start : start + SCORING_BATCH_SIZE]
        ]
        ids = np.zeros((SCORING_BATCH_SIZE, T + 1), dtype=np.int32)  # one shape: compiled once
        mask = np.zeros((SCORING_BATCH_SIZE, T), dtype=np.float32)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = row[: T + 1]
            mask[n, : len(row) - 1] = 1
        scores = score(mx.array(ids[:, :-1]), mx.array(ids[:, 1:]), mx.array(mask))
        result += np.array(scores)[: len(rows)].tolist()
    return result


NUM_STORIES = 100
NUM_WINDOWS = 20  # texts in data without end-of-text


def _sample_held_out(
    tokens: SplitArray, tokenizer: Tokenizer, seed: int
) -> Iterator[tuple[str, bool]]:
    """Yield (text, is_complete) of random validation documents, truncated to the maximum length of
    a sample; of consecutive windows if the tokenizer has no end-of-text.
    """
    ids = np.asarray(tokens.ids)
    if tokenizer.end_of_text is None:
        end = min(len(ids), NUM_WINDOWS * WINDOW_TOKENS)
        for start in range(0, end - WINDOW_TOKENS + 1, WINDOW_TOKENS):
            yield tokenizer.decode(ids[start : start + WINDOW_TOKENS].tolist()), False
        return
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    starts = np.concatenate([[0], ends[:-1] + 1])
    order = np.random.Philox(key=derive_seed(seed, "held out")).random_raw(len(ends)).argsort()
    for n in order[:NUM_STORIES]:
        document_ids = ids[starts[n] : ends[n]].tolist()
        is_complete = len(document_ids) <= MAX_STORY_TOKENS
        yield tokenizer.decode(document_ids[:MAX_STORY_TOKENS]), is_complete


DECODE_CHUNK_TOKENS = 1 << 18  # tokens decoded at a time


def _decode_training_text(
    tokens: SplitArray, tokenizer: Tokenizer, max_bytes: int | None = None
) -> Iterator[str]:
    """Yield the training text in chunks that end between words, with a NUL after each document."""
    vocab_bytes = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
    if tokenizer.end_of_text is not None:
        vocab_bytes[tokenizer.end_of_text] = NUL.encode()
    rest, bytes_done = b"", 0
    for start in range(0, len(tokens.ids), DECODE_CHUNK_TOKENS):
        ids = tokens.ids[start : start + DECODE_CHUNK_TOKENS].tolist()
        text = rest + b"".join(map(vocab_bytes.__getitem__, ids))
        split_at = max(text.rfind(b" "), text.rfind(b"\n"), text.rfind(NUL.encode())) + 1
        rest = text[split_at:]
        yield text[:split_at].decode("utf-8", errors="replace")
        bytes_done += split_at
        if max_bytes and bytes_done > max_bytes:
            return
    yield rest.decode("utf-8", errors="replace")
