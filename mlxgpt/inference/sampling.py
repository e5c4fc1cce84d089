"""Sampling of the next token from logits: temperature, top-k, top-p, min-p, repetition penalty.

Each filter maps logits[B, V] to logits[B, V], with -inf for excluded tokens. The order is that of
Hugging Face transformers: penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlxgpt.config import SamplingParams

NEG_INF = float("-inf")

MIN_TEMPERATURE = 1e-5  # below, sampling is greedy, as dividing logits by it may overflow


@dataclass(frozen=True)
class SamplerSpec:
    """The static part of the sampling parameters, for which a sampler is compiled. Other values are
    arguments of the compiled function, see `pack_sampling_params`.
    """

    greedy: bool
    top_k: int
    has_top_p: bool
    has_min_p: bool
    has_penalty: bool

    @classmethod
    def from_sampling(cls, sampling: SamplingParams, vocab_size: int) -> SamplerSpec:
        """Make the spec of sampling parameters; filters without effect are off."""
        greedy = sampling.temperature < MIN_TEMPERATURE
        return cls(
            greedy,
            sampling.top_k if not greedy and sampling.top_k < vocab_size else 0,
            not greedy and sampling.top_p < 1.0,
            not greedy and sampling.min_p > 0.0,
            sampling.repetition_penalty != 1.0,
        )


def pack_sampling_params(sampling: SamplingParams) -> mx.array:
    """Pack temperature, top-p, min-p and repetition penalty into an array, float32 [4]."""
    s = sampling
    return mx.array([s.temperature or 1.0, s.top_p, s.min_p, s.repetition_penalty])


def make_sampler(spec: SamplerSpec) -> Callable[..., mx.array]:
    """Make a function (logits[B, V], seen_mask, sampling_params, keys[B, 2]) -> ids, int32 [B]; see
    `make_logits_processor` and `categorical`.
    """
    process = make_logits_processor(spec)

    def sampler(
        logits: mx.array, seen_mask: mx.array, sampling_params: mx.array, keys: mx.array
    ) -> mx.array:
        logits = process(logits, seen_mask, sampling_params)
        if spec.greedy:
            return mx.argmax(logits, axis=-1).astype(mx.int32)
        return categorical(logits, keys)

    return sampler


def make_logits_processor(spec: SamplerSpec) -> Callable[..., mx.array]:
    """Make a function (logits[B, V], seen_mask, sampling_params) -> logits, float32 [B, V], which
    applies all filters. `seen_mask`, bool [B, V], marks the tokens for the repetition penalty.
    """

    def process(logits: mx.array, seen_mask: mx.array, sampling_params: mx.array) -> mx.array:
        temperature, top_p_value, min_p_value, penalty = sampling_params
        logits = logits.astype(mx.float32)
        if spec.has_penalty:
            logits = repetition_penalty(logits, seen_mask, penalty)
        if spec.greedy:
            return logits
        logits = logits / temperature
        if spec.top_k:
            logits = top_k(logits, spec.top_k)
        if spec.has_top_p:
            logits = top_p(logits, top_p_value)
        if spec.has_min_p:
            logits = min_p(logits, min_p_value)
        return logits

    return process


def repetition_penalty(
    logits: mx.array, seen_mask: mx.array, penalty: mx.array | float
) -> mx.array:
    """Make tokens that already occurred less likely (CTRL, Keskar et al., 2019): divide positive
    logits by the penalty, multiply negative ones.
    """
    penalized = mx.where(logits > 0, logits / penalty, logits * penalty)
    return mx.where(seen_mask, penalized, logits)


def top_k(logits: mx.array, k: int) -> mx.array:
    """Keep the k most likely tokens, and ties with the last of them."""
    partitioned = -mx.partition(-logits, k - 1, axis=-1)
    return mx.where(logits >= partitioned[..., k - 1 : k], logits, NEG_INF)


def top_p(logits: mx.array, p: mx.array | float) -> mx.array:
    """Nucleus sampling (Holtzman et al., 2020): keep the smallest set of most likely tokens with a
    total probability of at least p (at least one token), and ties with the last of them.
    """
    probs = mx.softmax(logits, axis=-1)
    sorted_probs = -mx.sort(-probs, axis=-1)
    preceding_probs = mx.cumsum(sorted_probs, axis=-1) - sorted_probs  # total of more likely tokens
    cutoff_index = mx.maximum((preceding_probs < p).sum(axis=-1, keepdims=True), 1) - 1
    cutoff = mx.take_along_axis(sorted_probs, cutoff_index, axis=-1)
    return mx.where(probs >= cutoff, logits, NEG_INF)


def min_p(logits: mx.array, p: mx.array | float) -> mx.array:
    """Keep tokens at least p times as likely as the most likely one (Nguyen et al., 2024)."""
    probs = mx.softmax(logits, axis=-1)
    return mx.where(probs >= p * probs.max(axis=-1, keepdims=True), logits, NEG_INF)


def categorical(logits: mx.array, keys: mx.array) -> mx.array:
    """Sample one id per row from the softmax of logits[B, V], by inverse transform sampling; int32
    [B]. Never returns a token whose probability is 0.

    Args:
        keys: random key of each row, uint32 [B, 2], so that rows do not depend on each other.
    """
    weights = mx.exp(logits - logits.max(axis=-1, keepdims=True))
    # A GPU's parallel cumsum adds in varying order, so rounding can increase it where the weight is
    # 0; such an id must not be the first above the threshold.
    cumulative = mx.where(weights > 0, mx.cumsum(weights, axis=-1), 0)
    total = cumulative.max(axis=-1, keepdims=True)
    uniform = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))(keys)  # [B, 1], below 1
    # Always below the total, even after rounding: no cumulative sum exceeds the total.
    threshold = mx.minimum(uniform * total, total * (1 - 2**-23))
    return mx.argmax(cumulative > threshold, axis=-1).astype(mx.int32)


def top_probabilities(
    logits: mx.array, ids: mx.array, count: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Probabilities under logits[B, V], without sampling parameters: (probabilities of ids[B]; the
    `count` most likely ids [B, count], in descending order; their probabilities [B, count]).
    """
    probs = mx.softmax(logits.astype(mx.float32), axis=-1)
    top_ids, top_probs = top_values(probs, count)
    return mx.take_along_axis(probs, ids[:, None], axis=-1)[:, 0], top_ids, top_probs


def top_values(values: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The `count` largest of each row of values[B, V], in descending order: (columns, values)."""
    columns = mx.argpartition(-values, count - 1, axis=-1)[:, :count]
    largest = mx.take_along_axis(values, columns, axis=-1)
    order = mx.argsort(-largest, axis=-1)
    return mx.take_along_axis(columns, order, axis=-1), mx.take_along_axis(largest, order, axis=-1)
