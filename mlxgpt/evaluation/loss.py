"""Loss and bits per byte over a split, or a fixed sample of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import mlx.core as mx
import numpy as np

from mlxgpt.backend import device, execution
from mlxgpt.data.token_array import Tokens
from mlxgpt.data.tokenizers.char import Tokenizer, byte_lengths
from mlxgpt.distributed.group import LOCAL, ProcessGroup
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import make_eval_step
from mlxgpt.model.stats import flops_per_token
from mlxgpt.storage.run import Run
from mlxgpt.utils.errors import UserError

EvalStep = execution.PerThread[mx.array]


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
class EvalText:
    """A text to evaluate on.

    Attributes:
        tokens: its ids.
        tokenizer: which they are of.
        bos: the token that the model's texts begin with; None if they begin without one.
    """

    tokens: Tokens
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
        step: the compiled evaluation step, see `eval_step`.
        batch_size: windows at a time, over all threads.
        limit: about how many tokens to predict, in windows spread evenly over the text, always the
            same; default: all.
        group: processes that evaluate together, each some of the batches.
    """

    def __init__(
        self,
        model: GPT,
        text: EvalText,
        step: EvalStep,
        *,
        batch_size: int,
        limit: int | None = None,
        group: ProcessGroup = LOCAL,
    ) -> None:
        self._group = group
        ids = np.asarray(text.tokens.ids, dtype=np.int32)
        if text.bos is not None:
            ids = np.concatenate([np.array([text.bos], dtype=np.int32), ids])
        if len(ids) < 2:
            raise _too_short()
        if ids.max() >= model.config.vocab_size:
            raise UserError(
                f"the text holds id {ids.max()}, beyond the model's vocabulary",
                "use data that was prepared with this run's tokenizer.",
            )
        T = model.config.block_size
        windows = math.ceil((len(ids) - 1) / T)
        chosen = windows if limit is None else max(1, min(windows, math.ceil(limit / T)))
        self._ids = ids
        self._starts = T * (np.arange(chosen) * windows // chosen)
        targets = np.concatenate([ids[start + 1 : start + 1 + T] for start in self._starts])
        self.tokens = len(targets)
        self._bytes = int(byte_lengths(text.tokenizer)[targets].sum())
        if not self._bytes:
            raise _too_short()
        forward = T * flops_per_token(model.config) / 3
        most = device.rows_at_once(forward) or batch_size
        self._rows = max(1, min(batch_size, chosen, most) // execution.thread_count())  # a thread
        self._block_size = T
        self._model = model
        self._step = step

    def __call__(self) -> Evaluation:
        """Evaluate the model as it is now."""
        parameters = self._model.parameters()
        batches = islice(self._batches(), self._group.rank, None, self._group.size)
        shares = ((parameters, *map(mx.array, batch)) for batch in batches)
        total = 0.0
        waiting: list[mx.array] = []
        while some := list(islice(shares, execution.thread_count())):
            # The device has the next batches before the last ones are waited for.
            losses = self._step(some)
            mx.async_eval(losses)
            total += sum(map(float, waiting))
            waiting = losses
        total += sum(map(float, waiting))
        total = sum(self._group.gather("validation losses", total))
        loss = total / self.tokens
        bits = total / math.log(2) / self._bytes
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Evaluation(loss, bits, perplexity, self.tokens)

    def _batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(inputs, targets, mask), each [B, T], of one shape; rows beyond the last are masked."""
        B, T = self._rows, self._block_size
        for first in range(0, len(self._starts), B):
            inputs, targets = np.zeros((2, B, T), dtype=np.int32)
            mask = np.zeros((B, T), dtype=np.float32)
            for row, start in enumerate(self._starts[first : first + B]):
                window = self._ids[start : start + T + 1]
                size = len(window) - 1
                inputs[row, :size], targets[row, :size] = window[:-1], window[1:]
                mask[row, :size] = 1
            yield inputs, targets, mask


def eval_step(model: GPT, dtype: mx.Dtype) -> EvalStep:
    """The compiled evaluation step of a model: one for each thread; see `losses.make_eval_step`."""
    return execution.PerThread(lambda: make_eval_step(model, dtype))


def evaluate(run: Run, model: GPT, tokens: Tokens) -> Evaluation:
    """Loss of a run's model over some tokens."""
    t = run.config.train
    text, step = EvalText(tokens, run.tokenizer, run.bos), eval_step(model, getattr(mx, t.dtype))
    return Evaluator(model, text, step, batch_size=t.batch_size)()


def _too_short() -> UserError:
    return UserError("the validation text is too short", "give one of two tokens or more.")
