"""What a model does inside as it reads ids: attention, what each layer would have said, the next
token's distribution under settings of sampling, neighbours of a token. By the model's own prefill.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from mlxgpt.backend import ops
from mlxgpt.config import Sampling
from mlxgpt.inference import sample
from mlxgpt.inference.decoding import NotFiniteError, are_finite
from mlxgpt.inference.sample import NEVER, Rules
from mlxgpt.model.gpt import GPT
from mlxgpt.model.inside import Inside

Likely = list[tuple[int, float]]  # (id, probability or likeness), falling
PORTION = 256  # embeddings whose lengths are found at a time: so many stay in a CPU's cache


class Look:
    """One pass over ids, kept.

    Args:
        vocab_size: ids from here on are never told of.
        ids: [T], at least one, no more than the block holds.
        switched_off: (layer, head) of those that are left out.

    Attributes:
        attention: float32 [n_layer, H, T, T], rows summing to 1.
        logits: [V], of what follows the last id.

    Raises:
        NotFiniteError: if these are NaN or infinite.
    """

    def __init__(
        self,
        model: GPT,
        vocab_size: int,
        ids: np.ndarray,
        switched_off: Iterable[tuple[int, int]] = (),
    ) -> None:
        inside = Inside(switched_off)
        rows, last = mx.array(ids[None], dtype=mx.int32), mx.array([len(ids) - 1], dtype=mx.int32)
        logits, _ = model.prefill(rows, last, inside)
        self._model, self._vocab_size = model, vocab_size
        self._residual = mx.concatenate(inside.residual)  # [n_layer + 1, T, C]
        self.attention = np.array(mx.concatenate(inside.attention))
        self.logits = logits[0]
        finite = are_finite(self.logits)
        mx.eval(self._residual, self.logits, finite)
        if not finite:
            raise NotFiniteError

    def lens(self, position: int, count: int) -> list[Likely]:
        """The likeliest tokens after a position by what the residual stream holds there: before the
        first block, and after each one; the last are the model's own.
        """
        logits = self._model.lens(self._residual[:, position])
        return [_first(row, count) for row in _shares(logits, self._vocab_size)]

    def next(self, count: int) -> Likely:
        """The likeliest tokens after the last id."""
        return _first(_shares(self.logits, self._vocab_size), count)


def left_by(
    sampling: Sampling, logits: mx.array, vocab_size: int, seen: np.ndarray, count: int
) -> tuple[Likely, np.ndarray]:
    """What logits[V] make likely, and what settings leave of it: (the likeliest by the model alone,
    the probability with which each of these is drawn).

    Args:
        seen: ids that count for a repetition penalty.
    """
    known = mx.arange(logits.shape[-1]) < vocab_size
    rows = mx.where(known, logits.astype(mx.float32), NEVER)[None]
    held = np.zeros(rows.shape, dtype=bool)
    held[0, seen] = True
    rules = Rules.of(sampling, vocab_size)
    left = sample.process(rows, mx.array(held), sample.values(sampling), rules)
    if rules.greedy:
        best = mx.argmax(left, axis=-1, keepdims=True)
        left = mx.where(mx.arange(left.shape[-1]) == best, 0.0, NEVER)
    likely = _first(_shares(logits, vocab_size), count)
    return likely, _shares(left[0], vocab_size)[[id for id, _ in likely]]


class Neighbourhood:
    """Which tokens' embeddings point where another one's does. The lengths of all of them are found
    once, and kept.

    Args:
        vocab_size: ids from here on are never told of.
    """

    def __init__(self, model: GPT, vocab_size: int) -> None:
        self._model = model
        ids = [mx.arange(n, min(n + PORTION, vocab_size)) for n in range(0, vocab_size, PORTION)]
        rows = [mx.linalg.norm(model.wte(one).astype(mx.float32), axis=-1) for one in ids]
        self._lengths = np.array(mx.concatenate(rows))

    def of(self, id: int, count: int) -> Likely:
        """The nearest ones to a token, by the cosine between them, without itself."""
        products = self._model.by_embedding(self._model.wte(mx.array([id])))[0]
        along = np.array(products.astype(mx.float32))[: len(self._lengths)]
        with np.errstate(all="ignore"):  # what overflows is an error below
            cosines = along / np.maximum(self._lengths * self._lengths[id], 1e-30)
        if not np.isfinite(cosines).all():
            raise NotFiniteError
        return [near for near in _first(cosines, count + 1) if near[0] != id][:count]


def _shares(logits: mx.array, vocab_size: int) -> np.ndarray:
    return np.array(ops.softmax(logits[..., :vocab_size].astype(mx.float32)))


def _first(shares: np.ndarray, count: int) -> Likely:
    count = min(count, len(shares))
    first = np.argpartition(-shares, count - 1)[:count]
    return [(int(id), float(shares[id])) for id in first[np.argsort(-shares[first], kind="stable")]]
