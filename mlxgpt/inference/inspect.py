"""What a model computes as it reads ids: attention, the logit lens of each layer, the next token's
distribution under settings of sampling, a token's nearest embeddings. By the model's own forward
pass.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from mlxgpt.backend import ops
from mlxgpt.config import Sampling
from mlxgpt.inference.engine import NotFiniteError, are_finite
from mlxgpt.inference.sampling import (
    NEG_INF,
    SamplerSpec,
    make_logits_processor,
    setting_values,
)
from mlxgpt.model.activations import ActivationRecorder
from mlxgpt.model.gpt import GPT
from mlxgpt.model.kv_cache import KVCache

TopTokens = list[tuple[int, float]]  # (id, probability or cosine), falling
PORTION = 256  # embeddings whose norms are computed at a time; these fit into a CPU's cache


class ForwardTrace:
    """One forward pass over ids, with what was computed on its way.

    Args:
        vocab_size: ids from here on are never among the top tokens.
        ids: [T], at least one, no more than the block holds.
        switched_off: (layer, head) of the heads that are left out.

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
        recorder = ActivationRecorder(switched_off)
        rows, last = mx.array(ids[None], dtype=mx.int32), mx.array([len(ids) - 1], dtype=mx.int32)
        logits = model(rows, KVCache(), last=last, recorder=recorder)
        self._model, self._vocab_size = model, vocab_size
        self._residual = mx.concatenate(recorder.residual)  # [n_layer + 1, T, C]
        self.attention = np.array(mx.concatenate(recorder.attention))
        self.logits = logits[0]
        finite = are_finite(self.logits)
        mx.eval(self._residual, self.logits, finite)
        if not finite:
            raise NotFiniteError

    def lens(self, position: int, count: int) -> list[TopTokens]:
        """The likeliest tokens after a position by what the residual stream holds there: before the
        first block, and after each one; the last are the model's own.
        """
        logits = self._model.lens(self._residual[:, position])
        return [_top(row, count) for row in _probabilities(logits, self._vocab_size)]

    def next(self, count: int) -> TopTokens:
        """The likeliest tokens after the last id."""
        return _top(_probabilities(self.logits, self._vocab_size), count)


def sampled_probabilities(
    sampling: Sampling, logits: mx.array, vocab_size: int, seen: np.ndarray, count: int
) -> tuple[TopTokens, np.ndarray]:
    """What logits[V] make likely, and what settings leave of it: (the likeliest tokens by the model
    alone, the probability with which each of these is drawn).

    Args:
        seen: ids that count for a repetition penalty.
    """
    known = mx.arange(logits.shape[-1]) < vocab_size
    rows = mx.where(known, logits.astype(mx.float32), NEG_INF)[None]
    is_seen = np.zeros(rows.shape, dtype=bool)
    is_seen[0, seen] = True
    spec = SamplerSpec.of(sampling, vocab_size)
    left = make_logits_processor(spec)(rows, mx.array(is_seen), setting_values(sampling))
    if spec.greedy:
        best = mx.argmax(left, axis=-1, keepdims=True)
        left = mx.where(mx.arange(left.shape[-1]) == best, 0.0, NEG_INF)
    likely = _top(_probabilities(logits, vocab_size), count)
    return likely, _probabilities(left[0], vocab_size)[[id for id, _ in likely]]


class EmbeddingNeighbors:
    """Finds the tokens whose embeddings point in the direction of another one's. The lengths of all
    embeddings are computed once, and kept.

    Args:
        vocab_size: ids from here on are never among them.
    """

    def __init__(self, model: GPT, vocab_size: int) -> None:
        self._model = model
        ids = [mx.arange(n, min(n + PORTION, vocab_size)) for n in range(0, vocab_size, PORTION)]
        rows = [mx.linalg.norm(model.wte(one).astype(mx.float32), axis=-1) for one in ids]
        self._lengths = np.array(mx.concatenate(rows))

    def of(self, id: int, count: int) -> TopTokens:
        """The nearest ones to a token, by the cosine between them, without itself."""
        products = self._model.by_embedding(self._model.wte(mx.array([id])))[0]
        along = np.array(products.astype(mx.float32))[: len(self._lengths)]
        with np.errstate(all="ignore"):  # what overflows is an error below
            cosines = along / np.maximum(self._lengths * self._lengths[id], 1e-30)
        if not np.isfinite(cosines).all():
            raise NotFiniteError
        return [near for near in _top(cosines, count + 1) if near[0] != id][:count]


def _probabilities(logits: mx.array, vocab_size: int) -> np.ndarray:
    return np.array(ops.softmax(logits[..., :vocab_size].astype(mx.float32)))


def _top(values: np.ndarray, count: int) -> TopTokens:
    count = min(count, len(values))
    first = np.argpartition(-values, count - 1)[:count]
    return [(int(id), float(values[id])) for id in first[np.argsort(-values[first], kind="stable")]]
