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


class PreferenceEvaluator:
    """Evaluates a model repeatedly on the same pairs. Collective.

    Args:
        model: the model that is trained.
        pairs: with the reference's log-probabilities.
        reference: parameters of the reference, as those of `model`.
        limit: approximate number of tokens in a fixed set of pairs; default: all pairs.

    Attributes:
        tokens: number of trained tokens in these pairs.
    """

    def __init__(
        self,
        model: GPT,
        pairs: PairArray,
        reference: dict,
        config: Config,
        group: ProcessGroup,
        limit: int | None = None,
    ) -> None:
        self._model, self._pairs, self._reference = model, pairs, reference
        self._config, self._group = config, group
        self._indices = pairs.spread_pairs(limit)
        self._step = _compile_step(make_kl_step, model, config)
        self.tokens = sum(
            int(pairs.example(2 * index + n).trained.sum())
            for index in self._indices
            for n in (0, 1)
        )

    def __call__(self) -> PreferenceEvaluation:
        """Evaluate the model with its current parameters."""
        assert self._pairs.reference is not None
        indices = self._indices[self._group.rank :: self._group.size]
        parameters = self._model.parameters(), self._reference
        logprobs, divergences = _map_answers(
            self._step, parameters, self._pairs, indices, self._config
        )
        rewards = self._config.train.beta * (logprobs - self._pairs.reference[indices])
        margins = rewards[:, 0] - rewards[:, 1]
        values = np.logaddexp(0, -margins), margins, margins > 0, divergences
        sums = self._group.gather("preferences", [float(array.sum()) for array in values])
        loss, margin, accuracy, kl = np.sum(sums, axis=0).tolist()
        count = len(self._indices)
        return PreferenceEvaluation(
            loss / count, margin / count, accuracy / count, kl / self.tokens
        )


def compute_logprobs(model: GPT, pairs: PairArray, config: Config) -> np.ndarray:
    """Log-probabilities of the answers of all pairs, float32 [pairs, 2]."""
    step = _compile_step(make_logprob_step, model, config)
    indices = range(pairs.pair_count)
    (logprobs,) = _map_answers(step, (model.parameters(),), pairs, indices, config)
    return logprobs.astype(np.float32)


Step = execution.PerThreadFunction[mx.array]


def _compile_step(make_step: Callable, model: GPT, config: Config) -> Step:
    """Compile a step of losses.py, once per thread."""
    dtype = getattr(mx, config.train.dtype)
    return execution.PerThreadFunction(lambda: make_step(model, dtype))


def _map_answers(
    step: Step,
    parameters: tuple[dict, ...],
    pairs: PairArray,
    indices: Sequence[int],
    config: Config,
) -> np.ndarray:
    """Call a step, which returns [outputs, B], on all answers of some pairs: [outputs, pairs, 2],
    float64.
    """
    T = pairs.row_length(config.model.block_size)
    answers = [pairs.example(2 * index + n) for index in indices for n in (0, 1)]
    B = rows_per_thread(config.model, T, config.train.batch_size)
    answers += [NO_TOKENS] * (-len(answers) % B)
    batches = (pad_windows(answers[n : n + B], T) for n in range(0, len(answers), B))
    calls = ((*parameters, *map(mx.array, batch)) for batch in batches)
    outputs: list[np.ndarray] = [np.zeros((len(parameters), 0))]
    while thread_calls := list(islice(calls, execution.thread_count())):
        outputs += [np.array(output, dtype=np.float64) for output in step(thread_calls)]
    values = np.concatenate(outputs, axis=1)[:, : 2 * len(indices)]
    return values.reshape(len(parameters), -1, 2)
