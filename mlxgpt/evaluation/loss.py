"""Loss and bits per byte of a model over a dataset, or over a fixed sample of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import mlx.core as mx
import numpy as np

from mlxgpt.backend import device, execution
from mlxgpt.config import ModelConfig
from mlxgpt.data.example_array import SplitArray, pad_windows
from mlxgpt.data.token_array import Window
from mlxgpt.data.tokenizers.base import Tokenizer, byte_lengths
from mlxgpt.distributed.group import LOCAL_GROUP, ProcessGroup
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import make_eval_step
from mlxgpt.model.stats import flops_per_token
from mlxgpt.storage.run import Run
from mlxgpt.utils.errors import UserError

EvalStep = execution.PerThreadFunction[mx.array]
NO_TOKENS = Window(np.zeros(1, dtype=np.int32), np.zeros(0, dtype=bool))


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

    def to_metrics(self) -> dict[str, float]:
        """Values for metrics.jsonl."""
        return {
            "val_loss": self.loss,
            "val_bits_per_byte": self.bits_per_byte,
            "val_tokens": self.tokens,
        }


@dataclass(frozen=True)
class EvalDataset:
    """A dataset to evaluate on.

    Attributes:
        tokens: token ids of the text.
        tokenizer: tokenizer that encoded them.
        bos: start token of the model's texts; None if they have none.
    """

    tokens: SplitArray
    tokenizer: Tokenizer
    bos: int | None


class Evaluator:
    """Evaluates a model repeatedly on the same dataset.

    The dataset provides windows of at most block_size tokens, which are padded and masked; of
    examples, only the trained tokens count. Uses no dropout and no random numbers, so evaluation
    does not affect training.

    Attributes:
        tokens: number of predicted tokens.

    Args:
        step: compiled evaluation step, see `compile_eval_step`.
        batch_size: windows per batch, over all threads.
        limit: approximate number of tokens to predict, in a fixed set of windows; default: all.
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
        largest = int(np.max(dataset.tokens.ids, initial=0))
        if largest >= model.config.vocab_size:
            raise UserError(
                f"the dataset has token id {largest}, beyond the model's vocabulary",
                "use a dataset that was prepared with this run's tokenizer.",
            )
        T = dataset.tokens.row_length(model.config.block_size)
        self._windows = dataset.tokens.windows(model.config.block_size, dataset.bos, limit)
        if not self._windows:
            raise _too_short_error()
        targets = np.concatenate([window.ids[1:][window.trained] for window in self._windows])
        self.tokens = len(targets)
        self._byte_count = int(byte_lengths(dataset.tokenizer)[targets].sum())
        if not self._byte_count:
            raise _too_short_error()
        self._rows_per_thread = rows_per_thread(
            model.config, T, min(batch_size, len(self._windows))
        )
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
        for first in range(0, len(self._windows), B):
            rows = self._windows[first : first + B]
            filler = [NO_TOKENS] * (B - len(rows))
            yield pad_windows([*rows, *filler], T)


def rows_per_thread(config: ModelConfig, length: int, rows: int) -> int:
    """Rows of `length` tokens that each thread evaluates at a time, out of `rows`."""
    max_rows = device.max_rows_per_batch(length * flops_per_token(config) / 3) or rows
    return max(1, min(rows, max_rows) // execution.thread_count())


def compile_eval_step(model: GPT, dtype: mx.Dtype) -> EvalStep:
    """Compile a model's evaluation step, once per thread; see `losses.make_eval_step`."""
    return execution.PerThreadFunction(lambda: make_eval_step(model, dtype))


def evaluate_run(run: Run, model: GPT, tokens: SplitArray) -> Evaluation:
    """Compute the loss of a run's model over an array of tokens or examples."""
    t = run.config.train
    dataset = EvalDataset(tokens, run.tokenizer, run.bos)
    step = compile_eval_step(model, getattr(mx, t.dtype))
    return Evaluator(model, dataset, step, batch_size=t.batch_size)()


def _too_short_error() -> UserError:
    return UserError("the validation text is too short", "use one with at least two tokens.")
