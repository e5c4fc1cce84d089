"""Sampling of the next id from logits: filters and a draw that compose.

Each filter takes and gives logits[B, V]; a token that must not be drawn gets -inf. The order is the
one of Hugging Face transformers: penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlxgpt.config import SamplingParams

NEG_INF = float("-inf")

MIN_TEMPERATURE = 1e-5  # below, one token has all the weight, and dividing may overflow


@dataclass(frozen=True)
class SamplerSpec:
    """Which sampling parameters have an effect: what a sampler is compiled for. Their values are
    arguments of the compiled function: see `pack_sampling_params`.
    """

    greedy: bool
    top_k: int
    has_top_p: bool
    has_min_p: bool
    has_penalty: bool

    @classmethod
    def from_sampling(cls, sampling: SamplingParams, vocab_size: int) -> SamplerSpec:
        """The spec of sampling parameters, for a vocabulary of this size."""
        greedy = sampling.temperature < MIN_TEMPERATURE
        return cls(
            greedy,
            sampling.top_k if not greedy and sampling.top_k < vocab_size else 0,
            not greedy and sampling.top_p < 1.0,
            not greedy and sampling.min_p > 0.0,
            sampling.repetition_penalty != 1.0,
        )


def pack_sampling_params(sampling: SamplingParams) -> mx.array:
    """The sampling parameters that compiled functions take as an array: float32 [4]."""
    s = sampling
    return mx.array([s.temperature or 1.0, s.top_p, s.min_p, s.repetition_penalty])


def make_sampler(spec: SamplerSpec) -> Callable[..., mx.array]:
    """A function (logits[B, V], seen_mask, sampling_params, keys[B, 2]) -> ids, int32 [B]; see
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
    """A function (logits[B, V], seen_mask, sampling_params) -> logits[B, V] to draw from, float32.
    `seen_mask`, bool [B, V], has the tokens that count for a repetition penalty; it is read for
    that alone.
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
    """Make tokens that the text already has less likely (CTRL, Keskar et al., 2019): a positive
    logit is divided by the penalty, a negative one multiplied.
    """
    penalized = mx.where(logits > 0, logits / penalty, logits * penalty)
    return mx.where(seen_mask, penalized, logits)


def top_k(logits: mx.array, k: int) -> mx.array:
    """Keep the k likeliest tokens; with the last of them, all that are as likely."""
    partitioned = -mx.partition(-logits, k - 1, axis=-1)
    return mx.where(logits >= partitioned[..., k - 1 : k], logits, NEG_INF)


def top_p(logits: mx.array, p: mx.array | float) -> mx.array:
    """Keep the fewest likeliest tokens that together hold probability p (nucleus sampling,
    Holtzman et al., 2020), and at least one; with the last of them, all that are as likely.
    """
    probs = mx.softmax(logits, axis=-1)
    sorted_probs = -mx.sort(-probs, axis=-1)
    preceding_probs = mx.cumsum(sorted_probs, axis=-1) - sorted_probs  # held by the likelier ones
    cutoff_index = mx.maximum((preceding_probs < p).sum(axis=-1, keepdims=True), 1) - 1
    cutoff = mx.take_along_axis(sorted_probs, cutoff_index, axis=-1)
    return mx.where(probs >= cutoff, logits, NEG_INF)


def min_p(logits: mx.array, p: mx.array | float) -> mx.array:
    """Keep tokens at least p times as probable as the likeliest (Nguyen et al., 2024)."""
    probs = mx.softmax(logits, axis=-1)
    return mx.where(probs >= p * probs.max(axis=-1, keepdims=True), logits, NEG_INF)


def categorical(logits: mx.array, keys: mx.array) -> mx.array:
    """Draw one id from each row of logits[B, V] by its softmax, int32 [B]: the first whose weights
    so far add up to more than a random share of all. Its own weight is never 0.

    Args:
        keys: uint32 [B, 2], each row's own: what is drawn does not depend on other rows.
    """
    weights = mx.exp(logits - logits.max(axis=-1, keepdims=True))
    # A GPU adds up in parallel, each id's sum in another order, and rounding can make a sum grow
    # where the weight is 0: such an id must not be the first above the share.
    cumulative = mx.where(weights > 0, mx.cumsum(weights, axis=-1), 0)
    total = cumulative.max(axis=-1, keepdims=True)
    uniform = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))(keys)  # [B, 1], below 1
    # Never all of it, to which no sum is greater, however it is rounded.
    threshold = mx.minimum(uniform * total, total * (1 - 2**-23))
    return mx.argmax(cumulative > threshold, axis=-1).astype(mx.int32)


def top_probabilities(
    logits: mx.array, ids: mx.array, count: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Probabilities by logits[B, V] alone: (of ids[B], [B]; the `count` likeliest ids, falling,
    [B, count]; their probabilities).
    """
    probs = mx.softmax(logits.astype(mx.float32), axis=-1)
    top_ids, top_probs = top_values(probs, count)
    return mx.take_along_axis(probs, ids[:, None], axis=-1)[:, 0], top_ids, top_probs


def top_values(values: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The `count` largest of each row of values[B, V], falling: (their columns, the values)."""
    columns = mx.argpartition(-values, count - 1, axis=-1)[:, :count]
    largest = mx.take_along_axis(values, columns, axis=-1)
    order = mx.argsort(-largest, axis=-1)
    return mx.take_along_axis(columns, order, axis=-1), mx.take_along_axis(largest, order, axis=-1)
