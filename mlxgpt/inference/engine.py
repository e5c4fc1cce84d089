"""A model compiled for generation: its prefill, and its decode steps, which sample as well.

Knows a model, nothing of texts.
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

BUCKETS = 8  # lengths that a function is compiled for, at most
SMALLEST_BUCKET = 16  # tokens
NOT_FINITE = -1  # in the place of an id, where none can be drawn
HEADROOM = 1e7  # by which a temperature and a penalty can enlarge a logit, which must stay finite
SMALL = 4_000_000  # parameters: with fewer, products are too small for several threads of BLAS, and
# those that wait for the next one would only be in the way; and a copy of the weights is cheap
ALL_THREADS = 1 << 16  # a share of BLAS's threads that leaves one to each product


class NotFiniteError(UserError):
    """A model's logits are NaN or infinite, so that no token can be drawn from them."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are not finite numbers (NaN or infinity)",
            "use another checkpoint: --checkpoint newest, or a step number; "
            "or train again with a lower --learning-rate.",
        )


class Tokens(NamedTuple):
    """One new token of each text, on the device.

    Attributes:
        ids: int32 [B]; NOT_FINITE where none could be drawn.
        seen: bool [B, V], the tokens that count for a repetition penalty, these included; [B, 1]
            without a penalty.
        probabilities: see `top_probabilities`; () where nobody asks.
    """

    ids: mx.array
    seen: mx.array
    probabilities: tuple[mx.array, ...]


class CompiledModel:
    """A model's compiled functions, to be kept. They are traced once for each of `BUCKETS` lengths
    of prompts, and of what is read of the cache; again for another number of texts, another kind of
    sampling. The model's weights are part of the
    traces, and must not change.

    Args:
        vocab_size: ids from here on are never drawn: a model may have room for more than its
            tokenizer gives.
    """

    def __init__(self, model: GPT, vocab_size: int) -> None:
        self.config = model.config
        self.vocab_size = vocab_size
        self.slides = model.slides
        is_small = count_parameters(model.config) < SMALL
        self.blas_share = ALL_THREADS if is_small else 1
        # Functions that do not know this object: with a cycle it would outlive its use, and its
        # arrays would leave the memory around them in pieces.
        self._model = _with_weights_by_columns(model) if is_small else model
        self._prefill = execution.compiled(partial(_prefill, self._model))
        self._samplers: dict[tuple[SamplerSpec, int], Callable] = {}
        self._steps: dict[tuple[SamplerSpec, int, int], Callable] = {}

    def bucket(self, length: int) -> int:
        """A length at least as great, one of a few; none above the block."""
        return min(-(-length // self.bucket_size) * self.bucket_size, self.config.block_size)

    @property
    def bucket_size(self) -> int:
        """The difference of two lengths that functions are compiled for, in tokens."""
        return max(SMALLEST_BUCKET, -(-self.config.block_size // BUCKETS))

    def capacity(self, length: int) -> int:
        """The length that a cache for this many tokens is made with; at most the block."""
        capacity = SMALLEST_BUCKET
        while capacity < length:
            capacity *= 2
        return min(capacity, self.config.block_size)

    def prefill(self, texts: Sequence[Sequence[int]]) -> tuple[mx.array, list[LayerKV]]:
        """Read the ids of texts, each at least one and at most a block. On Metal in parts, so that
        no command buffer is large.

        Returns:
            logits[B, V] of what follows each, and a cache as long as the longest one's bucket
        """
        last = np.array([len(text) - 1 for text in texts], dtype=np.int32)
        ids = np.zeros((len(texts), self.bucket(max(last) + 1)), dtype=np.int32)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text
        forward = ids.shape[1] * flops_per_token(self.config) / 3
        at_once = device.rows_at_once(forward) or len(ids)
        parts: list[tuple[mx.array, list[LayerKV]]] = []
        for rows in np.array_split(np.arange(len(ids)), -(-len(ids) // at_once)):
            if parts:
                mx.eval(parts[-1])
            same = (last[rows] == last[rows[0]]).all()
            places = last[rows[:1]] if same else last[rows]
            parts.append(self._prefill(mx.array(ids[rows]), mx.array(places)))
        if len(parts) == 1:
            return parts[0]
        layers = [
            (mx.concatenate([k for k, _ in layer]), mx.concatenate([v for _, v in layer]))
            for layer in zip(*(layers for _, layers in parts), strict=True)
        ]
        return mx.concatenate([logits for logits, _ in parts]), layers

    def sampler(self, spec: SamplerSpec, top: int) -> Callable[..., Tokens]:
        """A compiled function that draws after a prefill: (logits[B, V], seen, values, keys) ->
        `Tokens`, with the probabilities of the `top` likeliest.
        """
        if (spec, top) not in self._samplers:
            draw = _make_draw(spec, self.vocab_size, top)
            self._samplers[spec, top] = execution.compiled(draw)
        return self._samplers[spec, top]

    def step(self, spec: SamplerSpec, top: int, attended: int) -> Callable:
        """A compiled function that reads a token of each text and draws the next one:
        (ids[B], seen, values, keys, cache) -> (`Tokens`, layers). `cache` is KVCache's layers and
        position; its first `attended` places are read.
        """
        if (spec, top, attended) not in self._steps:
            draw = _make_draw(spec, self.vocab_size, top)
            step = _make_step(self._model, draw, attended)
            self._steps[spec, top, attended] = execution.compiled(step)
        return self._steps[spec, top, attended]

    def logits_after(self, ids: np.ndarray) -> mx.array:
        """Logits[V] of what follows the last of ids[T], of which the last block counts."""
        with execution.share_blas_threads(self.blas_share):
            logits, _ = self.prefill([ids[-self.config.block_size :].tolist()])
            finite = are_finite(logits).all()
            mx.eval(logits, finite)
        if not finite:
            raise NotFiniteError
        return logits[0]


def are_finite(logits: mx.array) -> mx.array:
    """Of each row of logits[..., V], whether it stays finite under every setting of sampling."""
    return mx.isfinite(logits.astype(mx.float32) * HEADROOM).all(axis=-1)


def _prefill(model: GPT, ids: mx.array, last: mx.array) -> tuple[mx.array, LayersKV]:
    cache = KVCache()
    logits = model(ids, cache, last=last)
    return logits, cache.layers


def _make_draw(spec: SamplerSpec, vocab_size: int, top: int) -> Callable:
    sampler = make_sampler(spec)

    def draw(
        logits: mx.array, seen: mx.array, values: mx.array, keys: mx.array
    ) -> tuple[mx.array, mx.array, tuple[mx.array, ...]]:
        finite = are_finite(logits)
        if vocab_size < logits.shape[-1]:
            logits = mx.where(mx.arange(logits.shape[-1]) < vocab_size, logits, NEG_INF)
        ids = mx.where(finite, sampler(logits, seen, values, keys), NOT_FINITE)
        if spec.penalty:
            seen = seen | (mx.arange(seen.shape[-1]) == ids[:, None])
        return ids, seen, top_probabilities(logits, ids, top) if top else ()

    return draw


def _make_step(model: GPT, draw: Callable, attended: int) -> Callable:
    def step(
        ids: mx.array,
        seen: mx.array,
        values: mx.array,
        keys: mx.array,
        cache: tuple[LayersKV, mx.array],
    ) -> tuple[tuple, LayersKV]:
        layers, position = cache
        view = KVCache(layers, position, attended)
        logits = model(ids[:, None], view)[:, 0]
        return draw(logits, seen, values, keys), view.layers

    return step


def _with_weights_by_columns(model: GPT) -> GPT:
    """On a CPU a copy, with weights as `ops.by_columns` lays them out."""
    if not device.on_cpu():
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight = ops.by_columns(module.weight)
    mx.eval(model.parameters())
    return model
