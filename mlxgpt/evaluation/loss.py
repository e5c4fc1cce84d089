"""Loss and bits per byte of a model over a dataset, or over a fixed sample of it."""

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
    """Loss of a model over a dataset.

    Attributes:
        loss: mean cross-entropy, nats per token.
        bits_per_byte: total loss in bits / UTF-8 bytes of the text; comparable between tokenizers.
        perplexity: e^loss.
        tokens: number of predicted tokens.
    """

    loss: float
    bits_per_byte: float
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class EvalDataset:
    """A dataset to evaluate on.

    Attributes:
        tokens: token ids of the text.
        tokenizer: tokenizer that encoded them.
        bos: start token of the model's texts; None if they have none.
    """

    tokens: TokenArray
    tokenizer: Tokenizer
    bos: int | None


class Evaluator:
    """Evaluates a model repeatedly on the same dataset.

    The ids are split into non-overlapping windows of block_size tokens, the last one padded and
    masked. Every token but the first is predicted once (with `bos` the first too). Uses no dropout
    and no random numbers, so evaluation does not affect training.

    Attributes:
        tokens: number of predicted tokens.

    Args:
        step: compiled evaluation step, see `compile_eval_step`.
        batch_size: windows per batch, over all threads.
        limit: approximate number of tokens to predict, in a fixed set of windows spread evenly over
            the dataset; default: all.
        group: processes that share the batches.
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
        """Evaluate the model with its current parameters."""
        parameters = self._model.parameters()
        batches = islice(self._batches(), self._group.rank, None, self._group.size)
        step_args = ((parameters, *map(mx.array, batch)) for batch in batches)
        total = 0.0
        pending: list[mx.array] = []
        while batch_args := list(islice(step_args, execution.thread_count())):
            # Submit the next batches before waiting for the previous ones.
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
        """Yield (inputs, targets, mask), each [B, T]; the last batch is padded and masked."""
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
    """Compile a model's evaluation step, once per thread; see `losses.make_eval_step`."""
    return execution.PerThreadFunction(lambda: make_eval_step(model, dtype))


def evaluate_run(run: Run, model: GPT, tokens: TokenArray) -> Evaluation:
    """Compute the loss of a run's model over a token array."""
    t = run.config.train
    dataset = EvalDataset(tokens, run.tokenizer, run.bos)
    step = compile_eval_step(model, getattr(mx, t.dtype))
    return Evaluator(model, dataset, step, batch_size=t.batch_size)()


def _too_short_error() -> UserError:
    return UserError("the validation text is too short", "use one with at least two tokens.")
