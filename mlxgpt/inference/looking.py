"""What a model does inside as it reads ids: attention, what each layer would have said, the next
token's distribution under settings of sampling, neighbours of a token. By the model's own prefill.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from mlxgpt.config import Sampling
from mlxgpt.inference import sample
from mlxgpt.inference.sample import NEVER, Rules
from mlxgpt.model.gpt import GPT
from mlxgpt.model.inside import Inside

Likely = list[tuple[int, float]]  # (id, probability or likeness), falling


class Look:
    """One pass over ids, kept.

    Args:
        vocab_size: ids from here on are never told of.
        ids: [T], at least one, no more than the block holds.
        switched_off: (layer, head) of those that are left out.

    Attributes:
        attention: float32 [n_layer, H, T, T], rows summing to 1.
        logits: float32 [V], of what follows the last id.
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
        self.logits = self._known(logits[0])
        mx.eval(self._residual, self.logits)

    def _known(self, logits: mx.array) -> mx.array:
        known = mx.arange(logits.shape[-1]) < self._vocab_size
        return mx.where(known, logits.astype(mx.float32), NEVER)

    def lens(self, position: int, count: int) -> list[Likely]:
        """The likeliest tokens after a position by what the residual stream holds there: before the
        first block, and after each one; the last are the model's own.
        """
        logits = self._known(self._model.lens(self._residual[:, position]))
        return [_first(row, count) for row in np.array(mx.softmax(logits, axis=-1))]

    def next(self, sampling: Sampling, seen: np.ndarray, count: int) -> tuple[Likely, np.ndarray]:
        """What may follow the last id: (the likeliest by the model alone, and what settings leave
        of these: the probability with which each is drawn).

        Args:
            seen: ids that count for a repetition penalty.
        """
        rules, logits = Rules.of(sampling, self._vocab_size), self.logits[None]
        held = np.zeros(logits.shape, dtype=bool)
        held[0, seen] = True
        left = sample.process(logits, mx.array(held), sample.values(sampling), rules)
        if rules.greedy:
            best = mx.argmax(left, axis=-1, keepdims=True)
            left = mx.where(mx.arange(left.shape[-1]) == best, 0.0, NEVER)
        likely = _first(np.array(mx.softmax(self.logits)), count)
        return likely, np.array(mx.softmax(left, axis=-1))[0, [id for id, _ in likely]]


def neighbours(model: GPT, vocab_size: int, id: int, count: int) -> Likely:
    """The tokens whose embeddings point where this one's does, by the cosine between them."""
    table = model.wte.weight[:vocab_size]
    lengths = mx.linalg.norm(table, axis=-1)
    likeness = table @ table[id] / mx.maximum(lengths * lengths[id], 1e-30)
    return [
        (other, share) for other, share in _first(np.array(likeness), count + 1) if other != id
    ][:count]


def _first(shares: np.ndarray, count: int) -> Likely:
    count = min(count, len(shares))
    first = np.argpartition(-shares, count - 1)[:count]
    return [(int(id), float(shares[id])) for id in first[np.argsort(-shares[first], kind="stable")]]
