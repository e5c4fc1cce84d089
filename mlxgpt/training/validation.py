"""Evaluation during training. The number of validation tokens depends on counts of steps and
tokens, not on timings, so that it is the same on every machine and after every interruption.
"""

from __future__ import annotations

from functools import partial

from mlxgpt.config import Config
from mlxgpt.data.dataset import Dataset
from mlxgpt.evaluation.loss import EvalDataset, Evaluation, Evaluator, compile_eval_step
from mlxgpt.training.step import TrainStep


class Validation:
    """Evaluates the model of a training step on the validation data. Collective.

    Args:
        bos: id of the token that starts each document; None if documents start without one.
    """

    def __init__(
        self, config: Config, dataset: Dataset, step_function: TrainStep, bos: int | None
    ) -> None:
        self._make_evaluator = partial(
            Evaluator,
            step_function.model,
            EvalDataset(dataset.val, dataset.tokenizer, bos),
            compile_eval_step(step_function.model, step_function.dtype),
            batch_size=config.train.batch_size,
            group=step_function.group,
        )
        val_tokens = len(dataset.val.ids)
        self._eval_tokens = count_eval_tokens(config, val_tokens)
        self._final_eval_tokens = count_final_eval_tokens(config, val_tokens)
        self._max_steps = config.train.max_steps
        self._evaluator = self._make_evaluator(limit=self._eval_tokens)

    def __call__(self, step: int) -> tuple[Evaluation, Evaluation]:
        """Evaluate after `step` steps. Returns the result on the tokens that every evaluation uses,
        comparable across steps, and the result to report, which is on more tokens at the end.
        """
        result = self._evaluator()
        if step == self._max_steps and self._final_eval_tokens > self._eval_tokens:
            return result, self._make_evaluator(limit=self._final_eval_tokens)()
        return result, result


def count_eval_tokens(config: Config, val_tokens: int) -> int:
    """Number of tokens per evaluation during training, out of `val_tokens`."""
    t = config.train
    steps = min(t.eval_interval, t.max_steps)
    return min(val_tokens, t.eval_tokens or _eval_token_budget(config, steps))


def count_final_eval_tokens(config: Config, val_tokens: int) -> int:
    """Number of tokens of the final evaluation: all, unless training was too short."""
    budget = _eval_token_budget(config, config.train.max_steps)
    return min(val_tokens, max(budget, count_eval_tokens(config, val_tokens)))


EVAL_TOKEN_SHARE = 0.15  # of the trained tokens: 5% of the time, since a step has 3 passes
MIN_EVAL_TOKENS = 8192  # fewer would be too noisy


def _eval_token_budget(config: Config, steps: int) -> int:
    return max(MIN_EVAL_TOKENS, int(EVAL_TOKEN_SHARE * steps * config.tokens_per_step))
