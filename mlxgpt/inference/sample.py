"""Logits -> next id: small functions that compose.

Each takes and gives logits[B, V]; a token that must not be chosen gets -inf. The order is the one
of Hugging Face transformers: penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import mlx.core as mx

from mlxgpt.config import Sampling

NEVER = float("-inf")


def process(logits: mx.array, seen: mx.array, sampling: Sampling) -> mx.array:
    """Logits[B, V], ready to be drawn from, float32.

    Args:
        logits: [B, V].
        seen: bool [B, V], which tokens the text holds already.
        sampling: the settings; temperature 0 leaves only the likeliest token.
    """
    logits = logits.astype(mx.float32)
    if sampling.repetition_penalty != 1.0:
        logits = repetition_penalty(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        best = mx.argmax(logits, axis=-1, keepdims=True)
        return mx.where(mx.arange(logits.shape[-1]) == best, logits, NEVER)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = top_k(logits, sampling.top_k)
    if sampling.top_p < 1.0:
        logits = top_p(logits, sampling.top_p)
    if sampling.min_p > 0.0:
        logits = min_p(logits, sampling.min_p)
    return logits


def draw(logits: mx.array, key: mx.array) -> mx.array:
    """One id from each row of logits[B, V], by its softmax: ids[B]."""
    return mx.random.categorical(logits, key=key)  # takes logits, not probabilities


def repetition_penalty(logits: mx.array, seen: mx.array, penalty: float) -> mx.array:
    """Make tokens that were there less likely (CTRL, Keskar et al., 2019): a positive logit is
    divided by the penalty, a negative one multiplied.
    """
    penalised = mx.where(logits > 0, logits / penalty, logits * penalty)
    return mx.where(seen, penalised, logits)


def top_k(logits: mx.array, k: int) -> mx.array:
    """Keep exactly the k likeliest tokens; of equals, the lower ids."""
    return mx.where(_rank(logits) < k, logits, NEVER)


def top_p(logits: mx.array, p: float) -> mx.array:
    """Keep the fewest likeliest tokens that together hold probability p (nucleus sampling,
    Holtzman et al., 2020), and at least one.
    """
    order = mx.argsort(-logits, axis=-1)
    sorted_probs = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1)
    before = mx.cumsum(sorted_probs, axis=-1) - sorted_probs  # held by the likelier ones
    keep = mx.take_along_axis(before, _rank(logits), axis=-1) < p
    return mx.where(keep | (_rank(logits) == 0), logits, NEVER)


def min_p(logits: mx.array, p: float) -> mx.array:
    """Keep tokens at least p times as probable as the likeliest (Nguyen et al., 2024)."""
    probs = mx.softmax(logits, axis=-1)
    return mx.where(probs >= p * probs.max(axis=-1, keepdims=True), logits, NEVER)


def _rank(logits: mx.array) -> mx.array:
    """0 for the likeliest token of a row, 1 for the next, …"""
    return mx.argsort(mx.argsort(-logits, axis=-1), axis=-1)
