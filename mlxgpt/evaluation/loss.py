"""Loss and bits per byte over a whole split."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import mlx.core as mx
import numpy as np

from mlxgpt.corpus.tokenizer import Tokenizer
from mlxgpt.corpus.tokens import Tokens
from mlxgpt.errors import UserError
from mlxgpt.model import lanes
from mlxgpt.model.gpt import GPT
from mlxgpt.model.lanes import Lanes
from mlxgpt.model.losses import make_eval_step
from mlxgpt.storage.run import Run


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


class Evaluator:
    """Evaluates one model on one text again and again, with one compiled step.

    The text is cut into windows of the training block that do not overlap; the last one is padded
    and masked, so that every token but the first is predicted once (and the first too, where texts
    begin with `bos`). No dropout and no random numbers: training is not touched.

    Args:
        tokens: the array to evaluate on.
        text_bytes: UTF-8 bytes of its text.
        bos: the token that the model's texts begin with; None where they begin without one.
        batch_size: windows at a time, over all lanes.
        dtype: of the forward pass.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        tokens: Tokens,
        text_bytes: int,
        *,
        bos: int | None,
        batch_size: int,
        dtype: mx.Dtype,
    ) -> None:
        ids = np.asarray(tokens.ids, dtype=np.int32)
        if bos is not None:
            ids = np.concatenate([np.array([bos], dtype=np.int32), ids])
        elif len(ids):
            text_bytes -= len(tokenizer.token_bytes(int(ids[0])))  # it is not predicted
        if len(ids) < 2 or text_bytes < 1:
            raise UserError("the validation text is too short", "give one of two tokens or more.")
        if ids.max() >= model.config.vocab_size:
            raise UserError(
                f"the text holds id {ids.max()}, beyond the model's vocabulary",
                "use data that was prepared with this run's tokenizer.",
            )
        self._ids = ids
        self._bytes = text_bytes
        windows = math.ceil((len(ids) - 1) / model.config.block_size)  # more rows are padding
        self._rows = max(1, min(batch_size, windows) // lanes.count())  # of each lane
        self._block_size = model.config.block_size
        self._model = model
        self._lanes = Lanes(lambda: make_eval_step(model, dtype))

    def __call__(self) -> Evaluation:
        """Evaluate the model as it is now."""
        parameters = self._model.parameters()
        shares = ((parameters, *map(mx.array, batch)) for batch in self._batches())
        total = 0.0
        while some := list(islice(shares, lanes.count())):
            total += sum(map(float, self._lanes(some)))
        count = len(self._ids) - 1
        loss = total / count
        bits = total / math.log(2) / self._bytes
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Evaluation(loss, bits, perplexity, count)

    def _batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(inputs, targets, mask), each [B, T], all of one shape."""
        B, T = self._rows, self._block_size
        count = len(self._ids) - 1
        for start in range(0, count, B * T):
            size = min(B * T, count - start)
            inputs, targets = np.zeros((2, B * T), dtype=np.int32)
            mask = np.zeros(B * T, dtype=np.float32)
            inputs[:size] = self._ids[start : start + size]
            targets[:size] = self._ids[start + 1 : start + size + 1]
            mask[:size] = 1
            yield inputs.reshape(B, T), targets.reshape(B, T), mask.reshape(B, T)


def evaluate(run: Run, model: GPT, tokens: Tokens, text_bytes: int) -> Evaluation:
    """Loss of a run's model over some tokens, of a text of so many UTF-8 bytes."""
    evaluator = Evaluator(
        model,
        run.tokenizer,
        tokens,
        text_bytes,
        bos=run.bos,
        batch_size=run.config.train.batch_size,
        dtype=getattr(mx, run.config.train.dtype),
    )
    return evaluator()
