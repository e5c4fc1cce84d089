"""Log-probabilities of the tokens of an existing text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from mlxgpt.backend.execution import compile_function
from mlxgpt.inference.engine import round_up_to_bucket
from mlxgpt.inference.sampling import top_values
from mlxgpt.model.gpt import GPT
from mlxgpt.utils.errors import UserError


@dataclass(frozen=True)
class ScoredToken:
    """One token of a text.

    Attributes:
        logprob: natural logarithm of its probability given the preceding tokens.
        alternatives: (id, log-probability) of the most likely tokens at its position, in
            descending order.
    """

    id: int
    logprob: float
    alternatives: list[tuple[int, float]]


class Scorer:
    """Computes log-probabilities of texts with one model, compiled for a few lengths.

    Args:
        vocab_size: the tokenizer's; the model's other ids are excluded.
    """

    def __init__(self, model: GPT, vocab_size: int) -> None:
        self._model, self._vocab_size = model, vocab_size
        self._compiled: dict[int, Callable[..., tuple[mx.array, ...]]] = {}

    def __call__(self, ids: np.ndarray, alternatives: int = 0) -> Iterator[list[ScoredToken]]:
        """Score each of ids[T] but the first, window by window. In long texts, each token is
        predicted from half a block to a block of preceding tokens, the last token from a full block
        as in generation.

        Raises:
            UserError: if a log-probability is not finite.
        """
        count = min(alternatives, self._vocab_size)
        if count not in self._compiled:
            self._compiled[count] = compile_function(
                partial(_score, self._model, self._vocab_size, count)
            )
        block_size = self._model.config.block_size
        last_start, stride = max(0, len(ids) - 1 - block_size), max(1, block_size // 2)
        scored_count = 0  # tokens scored so far
        for start in (0, *sorted(range(last_start, 0, -stride))):
            window = ids[start : start + block_size + 1]
            skip, scored_count = scored_count - start, start + len(window) - 1
            if skip < len(window) - 1:
                yield self._score_window(window, skip, count)

    def _score_window(self, window: np.ndarray, skip: int, count: int) -> list[ScoredToken]:
        length = len(window) - 1
        padded_length = round_up_to_bucket(length, self._model.config.block_size)
        inputs, targets = np.zeros((2, padded_length), dtype=np.int32)
        inputs[:length], targets[:length] = window[:-1], window[1:]
        arrays = self._compiled[count](mx.array(inputs), mx.array(targets))
        logprobs, top_ids, top_logprobs = (np.array(array)[skip:length] for array in arrays)
        if not (np.isfinite(logprobs).all() and np.isfinite(top_logprobs).all()):
            raise UserError(
                "the model's log-probabilities are not finite (NaN or infinity)",
                "its weights are damaged: restore the checkpoint, or train again.",
            )
        return [
            ScoredToken(id, logprob, list(zip(*alternatives, strict=True)))
            for id, logprob, *alternatives in zip(
                window[1 + skip :].tolist(),
                logprobs.tolist(),
                top_ids.tolist(),
                top_logprobs.tolist(),
                strict=True,
            )
        ]


def _score(
    model: GPT, vocab_size: int, count: int, ids: mx.array, targets: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Score a window: (log-probabilities of targets[T] given ids[T], the `count` most likely ids
    [T, count], their log-probabilities).
    """
    logits = model(ids[None])[0, :, :vocab_size].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    target_logprobs = mx.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0]
    if not count:
        empty = mx.zeros((len(targets), 0))
        return target_logprobs, empty.astype(mx.int32), empty
    return target_logprobs, *top_values(logprobs, count)
