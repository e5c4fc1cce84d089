"""Evaluation during training. The number of validation tokens depends on counts of steps and
tokens, not on timings, so that it is the same on every machine and after every interruption.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mlxgpt.config import Config
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.example_array import PairArray
from mlxgpt.evaluation.loss import EvalDataset, Evaluation, Evaluator, compile_eval_step
from mlxgpt.evaluation.preferences import (
    PreferenceEvaluation,
    PreferenceEvaluator,
    compile_kl_step,
)
from mlxgpt.training.step import TrainStep

Result = Evaluation | PreferenceEvaluation
MakeEvaluator = Callable[..., Evaluator | PreferenceEvaluator]


def make_evaluator(
    dataset: Dataset, step_function: TrainStep, bos: int | None, reference: dict
) -> MakeEvaluator:
    """Function that makes an evaluator of the model of a training step on validation data; it takes
    `limit`, see `Evaluator`.

    Args:
        bos: id of the token that starts each document; None if documents start without one.
        reference: parameters of DPO's reference; used if the dataset consists of pairs.
    """
    model, config, val = step_function.model, step_function.config, dataset.val
    if isinstance(val, PairArray):
        kl_step = compile_kl_step(model, reference, step_function.dtype)
        return partial(PreferenceEvaluator, kl_step, val, config, step_function.group)
    return _make_loss_evaluator(step_function, EvalDataset(val, dataset.tokenizer, bos))


def _make_loss_evaluator(
    step_function: TrainStep, dataset: EvalDataset
) -> Callable[..., Evaluator]:
    return partial(
        Evaluator,
        step_function.model,
        dataset,
        compile_eval_step(step_function.model, step_function.dtype),
        batch_size=step_function.config.train.batch_size,
        group=step_function.group,
    )


class Validation:
    """Evaluates the model of a training step on validation data. Collective.

    Args:
        bos, reference: see `make_evaluator`.
        base_val: validation data of the run that the initial weights are from, if any.
    """

    def __init__(
        self,
        dataset: Dataset,
        step_function: TrainStep,
        bos: int | None,
        base_val: EvalDataset | None = None,
        reference: dict | None = None,
    ) -> None:
        config = step_function.config
        self._make_evaluator = make_evaluator(dataset, step_function, bos, reference or {})
        val_tokens = len(dataset.val.ids)
        self._eval_tokens = count_eval_tokens(config, val_tokens)
        self._final_eval_tokens = count_final_eval_tokens(config, val_tokens)
        self._max_steps = config.train.max_steps
        self._evaluator = self._make_evaluator(limit=self._eval_tokens)
        self._base_evaluator = None
        if base_val:
            limit = count_eval_tokens(config, len(base_val.tokens.ids))
            self._base_evaluator = _make_loss_evaluator(step_function, base_val)(limit=limit)

    def __call__(self, step: int) -> tuple[Result, Result, Evaluation | None]:
        """Evaluate after `step` steps. Returns the result on the tokens that every evaluation uses,
        comparable across steps; the result to report, which is on more tokens at the end; and that
        of `evaluate_base`.
        """
        result = final_result = self._evaluator()
        if step == self._max_steps and self._final_eval_tokens > self._eval_tokens:
            final_result = self._make_evaluator(limit=self._final_eval_tokens)()
        return result, final_result, self.evaluate_base()

    def evaluate_base(self) -> Evaluation | None:
        """Evaluate on the validation data of the run that the initial weights are from, if any."""
        return self._base_evaluator() if self._base_evaluator else None


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
