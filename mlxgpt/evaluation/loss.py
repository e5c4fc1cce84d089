"""Loss and bits per byte over a split, or a fixed sample of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import mlx.core as mx
import numpy as np

from mlxgpt.backend import device, execution
from mlxgpt.data.token_array import TokenArray
from mlxgpt.data.tokenizers.base import Tokenizer, byte_lengths
from mlxgpt.distributed.group import LOCAL_GROUP, ProcessGroup
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import make_eval_step
from mlxgpt.model.stats import flops_per_token
from mlxgpt.storage.run import Run
from mlxgpt.utils.errors import UserError

EvalStep = execution.PerThreadFunction[mx.array]


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        loss: nats per token.
        bits_per_byte: all nats / ln 2 / UTF-8 bytes of the text, comparable between tokenizers.
        perplexity: e^loss.
        tokens: how many were predicted.
    """

    loss: float
    bits_per_byte: float
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class EvalDataset:
    """A text to evaluate on.

    Attributes:
        tokens: its ids.
        tokenizer: what encoded them.
        bos: the token that the model's texts begin with; None if they begin without one.
    """

    tokens: TokenArray
    tokenizer: Tokenizer
    bos: int | None


class Evaluator:
    """Evaluates one model on one text again and again, with one compiled step.

    The text is cut into windows of the training block that do not overlap; the last one is padded
    and masked, so that every token but the first is predicted once (and the first too, if texts
    begin with `bos`). No dropout and no random numbers: training is not touched.

    Attributes:
        tokens: how many are predicted.

    Args:
        step: the compiled evaluation step, see `compile_eval_step`.
        batch_size: windows at a time, over all threads.
        limit: about how many tokens to predict, in windows spread evenly over the text, always the
            same; default: all.
        group: processes that evaluate together, each some of the batches.
    """

    def __init__(
        self,
        model: GPT,
        dataset: EvalDataset,
        step: EvalStep,
        *,
        batch_size: int,
        limit: int | None = None,
        group: ProcessGroup = LOCAL_GROUP,
    ) -> None:
        self._group = group
        ids = np.asarray(dataset.tokens.ids, dtype=np.int32)
        if dataset.bos is not None:
            ids = np.concatenate([np.array([dataset.bos], dtype=np.int32), ids])
        if len(ids) < 2:
            raise _too_short_error()
        if ids.max() >= model.config.vocab_size:
            raise UserError(
                f"the dataset has token id {ids.max()}, beyond the model's vocabulary",
                "use a dataset that was prepared with this run's tokenizer.",
            )
        T = model.config.block_size
        num_windows = math.ceil((len(ids) - 1) / T)
        num_selected = num_windows
        if limit is not None:
            num_selected = max(1, min(num_windows, math.ceil(limit / T)))
        self._ids = ids
        self._starts = T * (np.arange(num_selected) * num_windows // num_selected)
        targets = np.concatenate([ids[start + 1 : start + 1 + T] for start in self._starts])
        self.tokens = len(targets)
        self._byte_count = int(byte_lengths(dataset.tokenizer)[targets].sum())
        if not self._byte_count:
            raise _too_short_error()
        window_flops = T * flops_per_token(model.config) / 3
        max_rows = device.max_rows_per_batch(window_flops) or batch_size
        num_rows = min(batch_size, num_selected, max_rows)
        self._rows_per_thread = max(1, num_rows // execution.thread_count())
        self._block_size = T
        self._model = model
        self._step = step

    def __call__(self) -> Evaluation:
        """Evaluate the model as it is now."""
        parameters = self._model.parameters()
        batches = islice(self._batches(), self._group.rank, None, self._group.size)
        step_args = ((parameters, *map(mx.array, batch)) for batch in batches)
        total = 0.0
        pending: list[mx.array] = []
        while batch_args := list(islice(step_args, execution.thread_count())):
            # The device has the next batches before the last ones are waited for.
            losses = self._step(batch_args)
            mx.async_eval(losses)
            total += sum(map(float, pending))
            pending = losses
        total += sum(map(float, pending))
        total = sum(self._group.gather("validation losses", total))
        loss = total / self.tokens
        bits = total / math.log(2) / self._byte_count
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Evaluation(loss, bits, perplexity, self.tokens)

    def _batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(inputs, targets, mask), each [B, T], of one shape; rows beyond the last are masked."""
        B, T = self._rows_per_thread, self._block_size
        for first in range(0, len(self._starts), B):
            inputs, targets = np.zeros((2, B, T), dtype=np.int32)
            mask = np.zeros((B, T), dtype=np.float32)
            for row, start in enumerate(self._starts[first : first + B]):
                window = self._ids[start : start + T + 1]
                size = len(window) - 1
                inputs[row, :size], targets[row, :size] = window[:-1], window[1:]
                mask[row, :size] = 1
            yield inputs, targets, mask


def compile_eval_step(model: GPT, dtype: mx.Dtype) -> EvalStep:
    """The compiled evaluation step of a model: one for each thread; see `losses.make_eval_step`."""
    return execution.PerThreadFunction(lambda: make_eval_step(model, dtype))


def evaluate_run(run: Run, model: GPT, tokens: TokenArray) -> Evaluation:
    """Loss of a run's model over some tokens."""
    t = run.config.train
    dataset = EvalDataset(tokens, run.tokenizer, run.bos)
    step = compile_eval_step(model, getattr(mx, t.dtype))
    return Evaluator(model, dataset, step, batch_size=t.batch_size)()


def _too_short_error() -> UserError:
    return UserError("the validation text is too short", "use one with at least two tokens.")
