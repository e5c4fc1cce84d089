from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.config import Sampling
from mlxgpt.inference import sample

rows = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=30)


def kept(logits: mx.array) -> np.ndarray:
    return np.isfinite(np.array(logits))


def probabilities(values: list[float]) -> np.ndarray:
    e = np.exp(np.array(values, dtype=np.float64) - max(values))
    return e / e.sum()


@given(rows, st.integers(1, 40))
def test_top_k_keeps_exactly_the_k_likeliest(values: list[float], k: int) -> None:
    keep = kept(sample.top_k(mx.array([values]), k))[0]
    assert keep.sum() == min(k, len(values))
    assert min(np.array(values)[keep]) >= max(np.array(values)[~keep], default=-np.inf)


@given(rows, st.floats(0.05, 0.99))
def test_top_p_keeps_the_fewest_that_hold_p(values: list[float], p: float) -> None:
    keep = kept(sample.top_p(mx.array([values]), p))[0]
    probs = probabilities(values)
    assert keep.any()
    assert probs[keep].min() >= probs[~keep].max(initial=0) - 1e-6
    assert probs[keep].sum() >= p - 1e-4
    assert probs[keep].sum() - probs[keep].min() < p + 1e-4


def test_top_p_keeps_one_token_at_least() -> None:
    assert kept(sample.top_p(mx.array([[1.0, 3.0, 2.0]]), 0.0)).tolist() == [[False, True, False]]


@given(rows, st.floats(0.01, 1.0))
def test_min_p_keeps_what_comes_near_the_likeliest(values: list[float], p: float) -> None:
    keep = kept(sample.min_p(mx.array([values]), p))[0]
    ratio = probabilities(values) / probabilities(values).max()
    assert keep[ratio.argmax()]
    assert (keep | (ratio < p * 1.001)).all()
    assert (~keep | (ratio > p * 0.999)).all()


def test_a_penalty_makes_what_was_seen_less_likely_whatever_its_sign() -> None:
    logits = mx.array([[2.0, -2.0, 2.0, -2.0]])
    seen = mx.array([[True, True, False, False]])
    found = np.array(sample.repetition_penalty(logits, seen, 2.0))
    np.testing.assert_allclose(found, [[1.0, -4.0, 2.0, -2.0]])


def test_temperature_zero_is_the_likeliest_token() -> None:
    logits = mx.array([[0.0, 3.0, 2.9], [5.0, 4.9, 0.0]])
    seen = mx.zeros(logits.shape, dtype=mx.bool_)
    for n in range(20):
        ids = sample.draw(sample.process(logits, seen, Sampling(temperature=0)), mx.random.key(n))
        assert ids.tolist() == [1, 0]


def test_nothing_set_changes_nothing() -> None:
    logits = mx.random.normal((2, 9), key=mx.random.key(0))
    seen = mx.ones(logits.shape, dtype=mx.bool_)
    assert (sample.process(logits, seen, Sampling(temperature=1.0)) == logits).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_softmaxs_frequencies(temperature: float) -> None:
    values = [1.0, 0.0, -1.0, 2.0]
    logits = mx.array([values] * 40_000)
    seen = mx.zeros(logits.shape, dtype=mx.bool_)
    processed = sample.process(logits, seen, Sampling(temperature=temperature))
    ids = np.array(sample.draw(processed, mx.random.key(1)))
    wanted = probabilities([v / temperature for v in values])
    np.testing.assert_allclose(np.bincount(ids, minlength=4) / 40_000, wanted, atol=0.01)
