"""Evaluation during training. How much of the validation text it reads is decided by counts, not by
clocks, so that it is the same on every machine and after every interruption.
"""

from __future__ import annotations

from functools import partial

from mlxgpt.config import Config
from mlxgpt.data.dataset import Dataset
from mlxgpt.evaluation.loss import EvalText, Evaluation, Evaluator, eval_step
from mlxgpt.training.step import TrainStep

SHARE = 0.15  # of the tokens trained on, which is 5 % of the time: a step is three forward passes
LEAST = 8192  # tokens: fewer would say nothing


class Validation:
    """Evaluates a training step's model; all ranks together.

    Args:
        bos: the token that the model's texts begin with; None where they begin without one.
    """

    def __init__(
        self, config: Config, dataset: Dataset, step_function: TrainStep, bos: int | None
    ) -> None:
        self._make = partial(
            Evaluator,
            step_function.model,
            EvalText(dataset.val, dataset.tokenizer, bos),
            eval_step(step_function.model, step_function.dtype),
            batch_size=config.train.batch_size,
            group=step_function.group,
        )
        there = len(dataset.val.ids)
        self._each, self._at_end = tokens_each(config, there), tokens_at_end(config, there)
        self._last = config.train.max_steps
        self._evaluate = self._make(limit=self._each)

    def __call__(self, step: int) -> tuple[Evaluation, Evaluation]:
        """After a step: on the tokens that each evaluation reads, so that all can be compared; and,
        at the end, on more.
        """
        result = self._evaluate()
        if step == self._last and self._at_end > self._each:
            return result, self._make(limit=self._at_end)()
        return result, result


def tokens_each(config: Config, there: int) -> int:
    """Tokens of an evaluation during training, of the `there` that the validation text has."""
    t = config.train
    return min(there, t.eval_tokens or _share(config, min(t.eval_interval, t.max_steps)))


def tokens_at_end(config: Config, there: int) -> int:
    """Tokens of the one at the end: all, unless the training was too short for that."""
    return min(there, max(_share(config, config.train.max_steps), tokens_each(config, there)))


def _share(config: Config, steps: int) -> int:
    return max(LEAST, int(SHARE * steps * config.tokens_per_step))
