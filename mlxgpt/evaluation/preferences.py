"""Preference pairs: log-probabilities under the reference model, and evaluation during DPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import mlx.core as mx
import numpy as np

from mlxgpt.backend import execution
from mlxgpt.config import Config
from mlxgpt.data.example_array import PairArray, pad_windows
from mlxgpt.distributed.group import ProcessGroup
from mlxgpt.evaluation.loss import NO_TOKENS, rows_per_thread
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import make_kl_step, make_logprob_step


@dataclass(frozen=True)
class PreferenceEvaluation:
    """How a model compares with its reference on pairs.

    Attributes:
        loss: mean DPO loss, nats per pair; ln 2 for the reference itself.
        margin: mean difference between the rewards of the chosen and the rejected answer.
        accuracy: fraction of pairs with the higher reward for the chosen answer.
        kl: KL divergence of the model's next-token distributions from the reference's, averaged
            over the tokens of all answers, nats per token.
    """

    loss: float
    margin: float
    accuracy: float
    kl: float

    def to_metrics(self) -> dict[str, float]:
        """Values for metrics.jsonl."""
        return {
            "val_loss": self.loss,
            "val_margin": self.margin,
            "val_accuracy": self.accuracy,
            "val_kl": self.kl,
        }


# Calls a compiled step on batches (inputs, targets, mask), at most one per thread; each returns
# [outputs, B].
AnswerStep = Callable[[Sequence[tuple]], list[mx.array]]


class PreferenceEvaluator:
    """Evaluates a model repeatedly on the same pairs. Collective.

    Args:
        step: see `compile_kl_step`.
        pairs: with the reference's log-probabilities.
        limit: approximate number of tokens in a fixed set of pairs; default: all pairs.

    Attributes:
        tokens: number of trained tokens in these pairs.
    """

    def __init__(
        self,
        step: AnswerStep,
        pairs: PairArray,
        config: Config,
        group: ProcessGroup,
        limit: int | None = None,
    ) -> None:
        self._step, self._pairs, self._config, self._group = step, pairs, config, group
        self._indices = pairs.spread_pairs(limit)
        answers = (pairs.example(2 * index + n) for index in self._indices for n in (0, 1))
        self.tokens = sum(int(answer.trained.sum()) for answer in answers)

    def __call__(self) -> PreferenceEvaluation:
        """Evaluate the model with its current parameters."""
        assert self._pairs.reference is not None
        indices = self._indices[self._group.rank :: self._group.size]
        logprobs, divergences = _map_answers(self._step, 2, self._pairs, indices, self._config)
        rewards = self._config.train.beta * (logprobs - self._pairs.reference[indices])
        margins = rewards[:, 0] - rewards[:, 1]
        values = np.logaddexp(0, -margins), margins, margins > 0, divergences
        sums = self._group.gather("preferences", [float(array.sum()) for array in values])
        loss, margin, accuracy, kl = np.sum(sums, axis=0).tolist()
        count = len(self._indices)
        return PreferenceEvaluation(
            loss / count, margin / count, accuracy / count, kl / self.tokens
        )


def compile_kl_step(model: GPT, reference: dict, dtype: mx.Dtype) -> AnswerStep:
    """Compile `losses.make_kl_step` for a model and the parameters of its reference."""
    step = execution.PerThreadFunction(lambda: make_kl_step(model, dtype))
    return lambda batches: step((model.parameters(), reference, *batch) for batch in batches)


def compute_logprobs(model: GPT, pairs: PairArray, config: Config) -> np.ndarray:
    """Log-probabilities of the answers of all pairs, float32 [pairs, 2]."""
    dtype = getattr(mx, config.train.dtype)
    step = execution.PerThreadFunction(lambda: make_logprob_step(model, dtype))

    def call(batches: Sequence[tuple]) -> list[mx.array]:
        return step((model.parameters(), *batch) for batch in batches)

    (logprobs,) = _map_answers(call, 1, pairs, range(pairs.pair_count), config)
    return logprobs.astype(np.float32)


def _map_answers(
    step: AnswerStep, outputs: int, pairs: PairArray, indices: Sequence[int], config: Config
) -> np.ndarray:
    """Outputs of a step for all answers of some pairs: [outputs, pairs, 2], float64."""
    T = pairs.row_length(config.model.block_size)
    answers = [pairs.example(2 * index + n) for index in indices for n in (0, 1)]
    B = rows_per_thread(config.model, T, config.train.batch_size)
    answers += [NO_TOKENS] * (-len(answers) % B)
    rows = (pad_windows(answers[n : n + B], T) for n in range(0, len(answers), B))
    batches = (tuple(map(mx.array, arrays)) for arrays in rows)
    results = [np.zeros((outputs, 0))]
    while thread_batches := list(islice(batches, execution.thread_count())):
        results += [np.array(result, dtype=np.float64) for result in step(thread_batches)]
    values = np.concatenate(results, axis=1)[:, : 2 * len(indices)]
    return values.reshape(outputs, -1, 2)
