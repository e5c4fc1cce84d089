"""Logits -> next id: small functions that compose.

Each takes and gives logits[B, V]; a token that must not be chosen gets -inf. The order is the one
of Hugging Face transformers: penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxgpt.config import Sampling

NEVER = float("-inf")
GREEDY = 1e-5  # a temperature below: dividing by it may overflow, and one token has all the weight

# Of each row the probability of its drawn id, [B]; the likeliest ids, [B, K], and theirs. Or ().
Telling = tuple[mx.array, ...]


@dataclass(frozen=True)
class Rules:
    """Which of a Sampling's settings do anything: what is traced anew where it changes. The others'
    values are numbers that a trace takes.
    """

    greedy: bool
    top_k: int
    top_p: bool
    min_p: bool
    penalty: bool

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int) -> Rules:
        """Of some settings, for so many tokens."""
        greedy = sampling.temperature < GREEDY
        return cls(
            greedy,
            sampling.top_k if not greedy and sampling.top_k < vocab_size else 0,
            not greedy and sampling.top_p < 1.0,
            not greedy and sampling.min_p > 0.0,
            sampling.repetition_penalty != 1.0,
        )


def values(sampling: Sampling) -> mx.array:
    """The settings that `choose` takes as numbers: float32 [4]."""
    s = sampling
    return mx.array([s.temperature or 1.0, s.top_p, s.min_p, s.repetition_penalty])


def choose(
    logits: mx.array, seen: mx.array, keys: mx.array, numbers: mx.array, rules: Rules
) -> mx.array:
    """One id for each row of logits[B, V], int32 [B]; see `process` and `draw`."""
    logits = process(logits, seen, numbers, rules)
    return mx.argmax(logits, axis=-1).astype(mx.int32) if rules.greedy else draw(logits, keys)


def process(logits: mx.array, seen: mx.array, numbers: mx.array, rules: Rules) -> mx.array:
    """Logits[B, V], ready to be drawn from, float32.

    Args:
        logits: [B, V].
        seen: bool [B, V], which tokens a text holds already; read for a penalty alone.
        numbers: see `values`.
    """
    temperature, p, least, penalty = numbers
    logits = logits.astype(mx.float32)
    if rules.penalty:
        logits = repetition_penalty(logits, seen, penalty)
    if rules.greedy:
        return logits
    logits = logits / temperature
    if rules.top_k:
        logits = top_k(logits, rules.top_k)
    if rules.top_p:
        logits = top_p(logits, p)
    return min_p(logits, least) if rules.min_p else logits


def likely(logits: mx.array, ids: mx.array, count: int) -> Telling:
    """How probable the drawn ids[B] were by logits[B, V], and the `count` likeliest, falling."""
    probs = mx.softmax(logits.astype(mx.float32), axis=-1)
    first = mx.argpartition(-probs, count - 1, axis=-1)[:, :count]
    shares = mx.take_along_axis(probs, first, axis=-1)
    order = mx.argsort(-shares, axis=-1)
    first, shares = (mx.take_along_axis(a, order, axis=-1) for a in (first, shares))
    return mx.take_along_axis(probs, ids[:, None], axis=-1)[:, 0], first, shares


def draw(logits: mx.array, keys: mx.array) -> mx.array:
    """Draw one id from each row of logits[B, V] by its softmax, int32 [B]: the first whose weights
    so far add up to more than a random share of all. Its own weight is never 0.

    Args:
        keys: uint32 [B, 2], each row's own: what is drawn does not depend on other rows.
    """
    weights = mx.exp(logits - logits.max(axis=-1, keepdims=True))
    # A GPU adds up in parallel, each id's sum in another order, and rounding can make a sum grow
    # where the weight is 0: such an id must not be the first above the share.
    sums = mx.where(weights > 0, mx.cumsum(weights, axis=-1), 0)
    total = sums.max(axis=-1, keepdims=True)
    share = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))(keys)  # [B, 1], below 1
    # Never all of it, to which no sum is greater, however it is rounded.
    drawn = mx.minimum(share * total, total * (1 - 2**-23))
    return mx.argmax(sums > drawn, axis=-1).astype(mx.int32)


def repetition_penalty(logits: mx.array, seen: mx.array, penalty: mx.array | float) -> mx.array:
    """Make tokens that were there less likely (CTRL, Keskar et al., 2019): a positive logit is
    divided by the penalty, a negative one multiplied.
    """
    penalised = mx.where(logits > 0, logits / penalty, logits * penalty)
    return mx.where(seen, penalised, logits)


def top_k(logits: mx.array, k: int) -> mx.array:
    """Keep the k likeliest tokens; with the last of them, all that are as likely."""
    falling = -mx.partition(-logits, k - 1, axis=-1)
    return mx.where(logits >= falling[..., k - 1 : k], logits, NEVER)


def top_p(logits: mx.array, p: mx.array | float) -> mx.array:
    """Keep the fewest likeliest tokens that together hold probability p (nucleus sampling,
    Holtzman et al., 2020), and at least one; with the last of them, all that are as likely.
    """
    probs = mx.softmax(logits, axis=-1)
    falling = -mx.sort(-probs, axis=-1)
    before = mx.cumsum(falling, axis=-1) - falling  # held by the likelier ones
    last = mx.maximum((before < p).sum(axis=-1, keepdims=True), 1) - 1
    return mx.where(probs >= mx.take_along_axis(falling, last, axis=-1), logits, NEVER)


def min_p(logits: mx.array, p: mx.array | float) -> mx.array:
    """Keep tokens at least p times as probable as the likeliest (Nguyen et al., 2024)."""
    probs = mx.softmax(logits, axis=-1)
    return mx.where(probs >= p * probs.max(axis=-1, keepdims=True), logits, NEVER)
