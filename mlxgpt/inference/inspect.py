"""Inspection of a model: attention weights, logit lens, next-token probabilities under sampling
parameters, nearest token embeddings. Uses the model's regular forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from mlxgpt.backend import ops
from mlxgpt.config import SamplingParams
from mlxgpt.inference.engine import NotFiniteError, are_finite
from mlxgpt.inference.sampling import (
    NEG_INF,
    SamplerSpec,
    make_logits_processor,
    pack_sampling_params,
)
from mlxgpt.model.activations import ActivationRecorder
from mlxgpt.model.gpt import GPT
from mlxgpt.model.kv_cache import KVCache

TopTokens = list[tuple[int, float]]  # (id, probability or cosine), in descending order


class ForwardTrace:
    """One forward pass over ids, with its attention weights, residual stream and logits.

    Args:
        vocab_size: the tokenizer's; the model's other ids are never among the top tokens.
        ids: [T], 1 to block_size of them.
        ablated_heads: (layer, head) of each head whose output is set to zero.

    Attributes:
        attention: float32 [n_layer, H, T, T], each row sums to 1.
        logits: [V], of the token after the last id.

    Raises:
        NotFiniteError: if logits are NaN or infinite.
    """

    def __init__(
        self,
        model: GPT,
        vocab_size: int,
        ids: np.ndarray,
        ablated_heads: Iterable[tuple[int, int]] = (),
    ) -> None:
        recorder = ActivationRecorder(ablated_heads)
        inputs, last = mx.array(ids[None], dtype=mx.int32), mx.array([len(ids) - 1], dtype=mx.int32)
        logits = model(inputs, KVCache(), last=last, recorder=recorder)
        self._model, self._vocab_size = model, vocab_size
        self._residual = mx.concatenate(recorder.residual)  # [n_layer + 1, T, C]
        self.attention = np.array(mx.concatenate(recorder.attention))
        self.logits = logits[0]
        finite = are_finite(self.logits)
        mx.eval(self._residual, self.logits, finite)
        if not finite:
            raise NotFiniteError

    def logit_lens(self, position: int, count: int) -> list[TopTokens]:
        """The most likely next tokens at a position by the logit lens (nostalgebraist, 2020),
        before the first block and after each block; the last entry is the model's prediction.
        """
        logits = self._model.compute_logits(self._residual[:, position])
        return [_top_tokens(row, count) for row in _probabilities(logits, self._vocab_size)]

    def next_tokens(self, count: int) -> TopTokens:
        """The most likely tokens after the last id."""
        return _top_tokens(_probabilities(self.logits, self._vocab_size), count)


def sampled_probabilities(
    sampling: SamplingParams, logits: mx.array, vocab_size: int, seen_ids: np.ndarray, count: int
) -> tuple[TopTokens, np.ndarray]:
    """Next-token probabilities before and after the sampling filters: (the `count` most likely
    tokens under logits[V] alone, the probability of sampling each of them).

    Args:
        seen_ids: ids that the repetition penalty applies to.
    """
    in_vocab = mx.arange(logits.shape[-1]) < vocab_size
    masked_logits = mx.where(in_vocab, logits.astype(mx.float32), NEG_INF)[None]
    seen_mask = np.zeros(masked_logits.shape, dtype=bool)
    seen_mask[0, seen_ids] = True
    spec = SamplerSpec.from_sampling(sampling, vocab_size)
    filtered_logits = make_logits_processor(spec)(
        masked_logits, mx.array(seen_mask), pack_sampling_params(sampling)
    )
    if spec.greedy:
        best = mx.argmax(filtered_logits, axis=-1, keepdims=True)
        filtered_logits = mx.where(mx.arange(filtered_logits.shape[-1]) == best, 0.0, NEG_INF)
    top_tokens = _top_tokens(_probabilities(logits, vocab_size), count)
    sampled = _probabilities(filtered_logits[0], vocab_size)
    return top_tokens, sampled[[id for id, _ in top_tokens]]


NORM_CHUNK_SIZE = 256  # embeddings per norm computation, small enough for CPU caches


class EmbeddingNeighbors:
    """Finds the tokens with the nearest embeddings by cosine similarity. Computes the norms of all
    embeddings once.

    Args:
        vocab_size: the tokenizer's; the model's other ids are excluded.
    """

    def __init__(self, model: GPT, vocab_size: int) -> None:
        self._model = model
        chunks = [
            mx.arange(n, min(n + NORM_CHUNK_SIZE, vocab_size))
            for n in range(0, vocab_size, NORM_CHUNK_SIZE)
        ]
        norms = [mx.linalg.norm(model.wte(chunk).astype(mx.float32), axis=-1) for chunk in chunks]
        self._norms = np.array(mx.concatenate(norms))

    def find_nearest(self, id: int, count: int) -> TopTokens:
        """Find the `count` tokens nearest to a token by cosine similarity, excluding itself."""
        scores = self._model.wte.as_linear(self._model.wte(mx.array([id])))[0]
        dot_products = np.array(scores.astype(mx.float32))[: len(self._norms)]
        with np.errstate(all="ignore"):  # overflow is reported below
            cosines = dot_products / np.maximum(self._norms * self._norms[id], 1e-30)
        if not np.isfinite(cosines).all():
            raise NotFiniteError
        neighbors = _top_tokens(cosines, count + 1)
        return [neighbor for neighbor in neighbors if neighbor[0] != id][:count]


def _probabilities(logits: mx.array, vocab_size: int) -> np.ndarray:
    return np.array(ops.softmax(logits[..., :vocab_size].astype(mx.float32)))


def _top_tokens(values: np.ndarray, count: int) -> TopTokens:
    count = min(count, len(values))
    top_ids = np.argpartition(-values, count - 1)[:count]
    top_ids = top_ids[np.argsort(-values[top_ids], kind="stable")]
    return [(int(id), float(values[id])) for id in top_ids]
