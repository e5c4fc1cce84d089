"""A model compiled for generation: prefill, and decode steps that include sampling.

Works on token ids, not text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxgpt.backend import device, execution, ops
from mlxgpt.inference.sampling import NEG_INF, SamplerSpec, make_sampler, top_probabilities
from mlxgpt.model.gpt import GPT, Linear
from mlxgpt.model.kv_cache import KVCache, LayerKV, LayersKV
from mlxgpt.model.stats import count_parameters, flops_per_token
from mlxgpt.utils.errors import UserError


class NotFiniteError(UserError):
    """Raised when a model's logits are NaN or infinite."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are not finite numbers (NaN or infinity)",
            "use another checkpoint (--checkpoint newest, or a step), "
            "or train a new run with a lower --learning-rate.",
        )


NOT_FINITE_ID = -1  # replaces an id if logits are not finite


class SampledTokens(NamedTuple):
    """One new token for each sequence, on the device.

    Attributes:
        ids: int32 [B]; NOT_FINITE_ID if logits are not finite.
        seen_mask: tokens for the repetition penalty, including the new ones, bool [B, V]; [B, 1]
            without a penalty.
        probabilities: see `top_probabilities`; () if not requested.
    """

    ids: mx.array
    seen_mask: mx.array
    probabilities: tuple[mx.array, ...]


MAX_BUCKETS = 8  # maximum number of lengths that a function is compiled for
MIN_BUCKET_SIZE = 16  # tokens


def round_up_to_bucket(length: int, block_size: int) -> int:
    """Round a length up to one of the few that functions are compiled for, at most block_size."""
    bucket_size = max(MIN_BUCKET_SIZE, -(-block_size // MAX_BUCKETS))
    return min(-(-length // bucket_size) * bucket_size, block_size)


SMALL_MODEL_PARAMS = 4_000_000  # smaller models are fastest with a single BLAS thread
SINGLE_THREAD_DIVISOR = 1 << 16  # large enough to reduce any number of BLAS threads to one


class CompiledModel:
    """Compiled prefill, decode and sampling functions of one model. They are traced once per bucket
    of prompt or cache lengths, batch size and `SamplerSpec`. The traces contain the weights, which
    must not change afterwards.

    Args:
        vocab_size: the tokenizer's; the model's other ids are never sampled.
    """

    def __init__(self, model: GPT, vocab_size: int) -> None:
        self.config = model.config
        self.vocab_size = vocab_size
        self.supports_sliding_window = model.supports_sliding_window
        is_small = count_parameters(model.config) < SMALL_MODEL_PARAMS
        self.blas_divisor = SINGLE_THREAD_DIVISOR if is_small else 1
        # The functions do not refer to self: a reference cycle would keep the object alive after
        # use, and its arrays would fragment memory.
        self._model = _to_column_major_weights(model) if is_small else model
        self._prefill = execution.compile_function(partial(_prefill, self._model))
        self._samplers: dict[tuple[SamplerSpec, int], Callable] = {}
        self._steps: dict[tuple[SamplerSpec, int, int], Callable] = {}

    def cache_capacity(self, length: int) -> int:
        """Capacity of a cache for `length` tokens: a power of two, at most block_size."""
        capacity = MIN_BUCKET_SIZE
        while capacity < length:
            capacity *= 2
        return min(capacity, self.config.block_size)

    def prefill(self, sequences: Sequence[Sequence[int]]) -> tuple[mx.array, list[LayerKV]]:
        """Prefill: run the model over sequences of 1 to block_size ids. On Metal it is split into
        parts, to keep command buffers small.

        Returns:
            logits[B, V] of the next token, and a cache as long as the longest sequence's bucket
        """
        last_indices = np.array([len(sequence) - 1 for sequence in sequences], dtype=np.int32)
        length = round_up_to_bucket(max(map(len, sequences)), self.config.block_size)
        ids = np.zeros((len(sequences), length), dtype=np.int32)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        flops_per_row = length * flops_per_token(self.config) / 3
        rows_per_part = device.max_rows_per_batch(flops_per_row) or len(ids)
        parts: list[tuple[mx.array, list[LayerKV]]] = []
        for rows in np.array_split(np.arange(len(ids)), -(-len(ids) // rows_per_part)):
            if parts:
                mx.eval(parts[-1])
            same_length = (last_indices[rows] == last_indices[rows[0]]).all()
            part_indices = last_indices[rows[:1]] if same_length else last_indices[rows]
            parts.append(self._prefill(mx.array(ids[rows]), mx.array(part_indices)))
        if len(parts) == 1:
            return parts[0]
        layers = [
            tuple(mx.concatenate(list(arrays)) for arrays in zip(*layer, strict=True))
            for layer in zip(*(layers for _, layers in parts), strict=True)
        ]
        return mx.concatenate([logits for logits, _ in parts]), layers

    def get_sampler(self, spec: SamplerSpec, top_count: int) -> Callable[..., SampledTokens]:
        """Compiled function that samples after a prefill: (logits[B, V], seen_mask,
        sampling_params, keys) -> fields of `SampledTokens`, with the probabilities of the
        `top_count` most likely tokens.
        """
        if (spec, top_count) not in self._samplers:
            draw = _make_draw(spec, self.vocab_size, top_count)
            self._samplers[spec, top_count] = execution.compile_function(draw)
        return self._samplers[spec, top_count]

    def get_decode_step(self, spec: SamplerSpec, top_count: int, kv_length: int) -> Callable:
        """Compiled decode step, which processes one token per sequence and samples the next one:
        (ids[B], seen_mask, sampling_params, keys, cache) -> (fields of `SampledTokens`, layers).
        `cache` is (layers, position) of a KVCache, whose first `kv_length` positions are read.
        """
        if (spec, top_count, kv_length) not in self._steps:
            draw = _make_draw(spec, self.vocab_size, top_count)
            step = _make_step(self._model, draw, kv_length)
            self._steps[spec, top_count, kv_length] = execution.compile_function(step)
        return self._steps[spec, top_count, kv_length]

    def next_token_logits(self, ids: np.ndarray) -> mx.array:
        """Logits[V] of the token after ids[T], truncated to the last block_size ids."""
        with execution.share_blas_threads(self.blas_divisor):
            logits, _ = self.prefill([ids[-self.config.block_size :].tolist()])
            finite = are_finite(logits).all()
            mx.eval(logits, finite)
        if not finite:
            raise NotFiniteError
        return logits[0]


LOGIT_HEADROOM = 1e7  # factor by which temperature and repetition penalty can scale a logit


def are_finite(logits: mx.array) -> mx.array:
    """Whether each row of logits[..., V] stays finite under all sampling parameters, bool [...]."""
    return mx.isfinite(logits.astype(mx.float32) * LOGIT_HEADROOM).all(axis=-1)


def _prefill(model: GPT, ids: mx.array, last: mx.array) -> tuple[mx.array, LayersKV]:
    cache = KVCache()
    logits = model(ids, cache, last=last)
    return logits, cache.layers


def _make_draw(spec: SamplerSpec, vocab_size: int, top_count: int) -> Callable:
    sampler = make_sampler(spec)

    def draw(
        logits: mx.array, seen_mask: mx.array, sampling_params: mx.array, keys: mx.array
    ) -> tuple[mx.array, mx.array, tuple[mx.array, ...]]:
        finite = are_finite(logits)
        if vocab_size < logits.shape[-1]:
            logits = mx.where(mx.arange(logits.shape[-1]) < vocab_size, logits, NEG_INF)
        ids = mx.where(finite, sampler(logits, seen_mask, sampling_params, keys), NOT_FINITE_ID)
        if spec.has_penalty:
            seen_mask = seen_mask | (mx.arange(seen_mask.shape[-1]) == ids[:, None])
        return ids, seen_mask, top_probabilities(logits, ids, top_count) if top_count else ()

    return draw


def _make_step(model: GPT, draw: Callable, kv_length: int) -> Callable:
    def step(
        ids: mx.array,
        seen_mask: mx.array,
        sampling_params: mx.array,
        keys: mx.array,
        cache: tuple[LayersKV, mx.array],
    ) -> tuple[tuple, LayersKV]:
        layers, position = cache
        view = KVCache(layers, position, kv_length)
        logits = model(ids[:, None], view)[:, 0]
        return draw(logits, seen_mask, sampling_params, keys), view.layers

    return step


def _to_column_major_weights(model: GPT) -> GPT:
    """On a CPU, a copy of the model with weights in `ops.to_column_major`; else the model."""
    if not device.on_cpu():
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight = ops.to_column_major(module.weight)
    mx.eval(model.parameters())
    return model
