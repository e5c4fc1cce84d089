from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlxgpt.config import SamplingParams
from mlxgpt.inference import sampling
from mlxgpt.inference.sampling import (
    NEG_INF,
    SamplerSpec,
    categorical,
    make_logits_processor,
    make_sampler,
    pack_sampling_params,
)

logits_strategy = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=30)


def finite_mask(logits: mx.array) -> np.ndarray:
    return np.isfinite(np.array(logits))


def probabilities(values: list[float]) -> np.ndarray:
    e = np.exp(np.array(values, dtype=np.float64) - max(values))
    return e / e.sum()


@given(logits_strategy, st.integers(1, 30))
def test_top_k_keeps_the_k_likeliest_and_ties(values: list[float], k: int) -> None:
    k = min(k, len(values))
    mask = finite_mask(sampling.top_k(mx.array([values]), k))[0]
    assert (mask == (np.array(values, np.float32) >= sorted(values)[-k])).all()


@given(logits_strategy, st.floats(0.05, 0.99))
def test_top_p_keeps_the_smallest_set_with_probability_p(values: list[float], p: float) -> None:
    mask = finite_mask(sampling.top_p(mx.array([values]), p))[0]
    probs = probabilities(values)
    assert mask.any()
    assert probs[mask].min() >= probs[~mask].max(initial=0) - 1e-6
    assert probs[mask].sum() >= p - 1e-4
    assert probs[probs > probs[mask].min() * (1 + 1e-6)].sum() < p + 1e-4


def test_top_p_keeps_at_least_one_token() -> None:
    assert finite_mask(sampling.top_p(mx.array([[1.0, 3.0, 2.0]]), 0.0)).tolist() == [
        [False, True, False]
    ]


@given(logits_strategy, st.floats(0.01, 1.0))
def test_min_p_is_relative_to_the_likeliest_token(values: list[float], p: float) -> None:
    mask = finite_mask(sampling.min_p(mx.array([values]), p))[0]
    ratio = probabilities(values) / probabilities(values).max()
    assert mask[ratio.argmax()]
    assert (mask | (ratio < p * 1.001)).all()
    assert (~mask | (ratio > p * 0.999)).all()


def test_repetition_penalty_lowers_positive_and_negative_logits() -> None:
    logits = mx.array([[2.0, -2.0, 2.0, -2.0]])
    seen_mask = mx.array([[True, True, False, False]])
    actual = np.array(sampling.repetition_penalty(logits, seen_mask, 2.0))
    np.testing.assert_allclose(actual, [[1.0, -4.0, 2.0, -2.0]])


def keys(count: int, seed: int = 0) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(rng.integers(2**32, size=(count, 2), dtype=np.uint32))


def process_logits(logits: mx.array, seen_mask: mx.array, settings: SamplingParams) -> mx.array:
    process = make_logits_processor(SamplerSpec.from_sampling(settings, logits.shape[-1]))
    return process(logits, seen_mask, pack_sampling_params(settings))


def test_temperature_zero_samples_the_likeliest_token() -> None:
    logits = mx.array([[0.0, 3.0, 2.9], [5.0, 4.9, 0.0]])
    seen_mask = mx.zeros(logits.shape, dtype=mx.bool_)
    greedy = SamplingParams(temperature=0, top_k=2, top_p=0.1, min_p=0.5)
    sampler = make_sampler(SamplerSpec.from_sampling(greedy, 3))
    for n in range(20):
        assert sampler(logits, seen_mask, pack_sampling_params(greedy), keys(2, n)).tolist() == [
            1,
            0,
        ]


def test_disabled_settings_leave_logits_unchanged() -> None:
    logits = mx.random.normal((2, 9), key=mx.random.key(0))
    seen_mask = mx.ones(logits.shape, dtype=mx.bool_)
    assert (process_logits(logits, seen_mask, SamplingParams(temperature=1.0)) == logits).all()


def test_sampler_spec_contains_only_effective_settings() -> None:
    assert SamplerSpec.from_sampling(SamplingParams(), 19) == SamplerSpec(
        False, 0, False, False, False
    )
    low_temperature = SamplingParams(temperature=0.1, seed=3)
    assert SamplerSpec.from_sampling(SamplingParams(top_k=19), 19) == SamplerSpec.from_sampling(
        low_temperature, 19
    )
    all_settings = SamplingParams(top_k=18, top_p=0.99, min_p=0.01, repetition_penalty=1.1)
    assert SamplerSpec.from_sampling(all_settings, 19) == SamplerSpec(False, 18, True, True, True)
    greedy = SamplerSpec.from_sampling(replace(all_settings, temperature=0), 19)
    assert greedy == SamplerSpec(True, 0, False, False, True)


@given(st.lists(st.floats(-50, 50, width=32) | st.just(NEG_INF), min_size=2), st.integers(0))
def test_masked_tokens_are_never_sampled(values: list[float], seed: int) -> None:
    assume(max(values) > NEG_INF)
    logits = mx.broadcast_to(mx.array(values), (200, len(values)))
    ids = np.array(categorical(logits, keys(200, seed)))
    assert ids.max() < len(values)
    assert (np.array(values)[ids] > NEG_INF).all()


def test_extreme_random_values_sample_a_valid_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for share in (1.0, 1 - 2**-24, 0.0):
        monkeypatch.setattr(mx.random, "uniform", lambda shape, key, s=share: mx.full(shape, s))
        for values in (
            [0.0, 1.0, NEG_INF],
            [0.1] * 1000 + [NEG_INF],
            [NEG_INF, 1.0],
        ):
            id = int(categorical(mx.array([values]), keys(1)))
            assert values[id] > NEG_INF


def parallel_cumsum(weights: mx.array, axis: int = -1) -> mx.array:
    """Cumulative sums [B, V] in the order of MLX's Metal and CUDA kernels (`contiguous_scan`): 4
    values per thread, 32 threads by doubling and 32 such groups, in float32.
    """
    assert axis == -1
    B, V = weights.shape
    groups = min(-(-V // 128), 32)
    size = groups * 128
    padded = np.pad(np.array(weights), [(0, 0), (0, -V % size)])
    prefix, results = np.zeros((B, 1, 1, 1), np.float32), []
    for block in np.split(padded, padded.shape[1] // size, axis=1):
        values = block.reshape(B, groups, 32, 4).cumsum(axis=-1, dtype=np.float32)
        threads = scan_by_doubling(values[..., -1])
        thread_offsets = exclusive_scan(threads)[..., None]
        group_offsets = exclusive_scan(scan_by_doubling(threads[..., -1]))[..., None, None]
        values = values + prefix + group_offsets + thread_offsets
        prefix = values[:, -1:, -1:, -1:]
        results.append(values.reshape(B, size))
    return mx.array(np.concatenate(results, axis=1)[:, :V])


def scan_by_doubling(x: np.ndarray) -> np.ndarray:
    for step in (1, 2, 4, 8, 16):
        x = x + np.pad(x, [(0, 0)] * (x.ndim - 1) + [(step, 0)])[..., : x.shape[-1]]
    return x


def exclusive_scan(x: np.ndarray) -> np.ndarray:
    return np.pad(x[..., :-1], [(0, 0)] * (x.ndim - 1) + [(1, 0)])


def sample_with(share: float, logits: np.ndarray, patch: pytest.MonkeyPatch) -> int:
    patch.setattr(mx.random, "uniform", lambda shape, key: mx.full(shape, share))
    return int(categorical(mx.array(logits)[None], keys(1)))


@pytest.mark.parametrize("size", [200, 1000, 6000])
def test_masked_tokens_are_not_sampled_despite_rounding_of_gpu_sums(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each random value lies between the cumulative sums before and at a masked token."""
    rng = np.random.default_rng(size)
    monkeypatch.setattr(mx, "cumsum", parallel_cumsum)
    draws = 0
    for _ in range(10):
        logits = rng.normal(size=size).astype(np.float32)
        logits[rng.random(size) < 0.7] = NEG_INF
        logits[-size // 10 :] = NEG_INF  # as for unused ids
        weights = mx.exp(mx.array(logits - logits.max()))[None]
        sums = np.array(parallel_cumsum(weights))[0]
        np.testing.assert_allclose(sums, np.array(weights)[0].cumsum(dtype=np.float64), rtol=1e-6)
        highest = np.maximum.accumulate(sums)
        increases = np.flatnonzero((np.array(weights)[0, 1:] == 0) & (sums[1:] > highest[:-1])) + 1
        for index in increases[:20]:
            share = highest[index - 1] / sums[-1]
            assert np.array(weights)[0, sample_with(float(share), logits, monkeypatch)] > 0
            draws += 1
    assert draws > 10


@given(st.data(), st.floats(0, 1, width=32))
def test_sampled_tokens_have_nonzero_weight_for_any_rounding(
    data: st.DataObject, share: float
) -> None:
    values = data.draw(st.lists(st.floats(-20, 20, width=32) | st.just(NEG_INF), min_size=1))
    assume(max(values) > NEG_INF)
    ulps = data.draw(st.lists(st.integers(-3, 3), min_size=len(values), max_size=len(values)))

    def rounded_cumsum(weights: mx.array, axis: int) -> mx.array:
        sums = np.array(weights).cumsum(axis=axis)
        return mx.array(sums + np.array(ulps) * np.spacing(sums))

    logits = np.array(values, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "cumsum", rounded_cumsum)
        id = sample_with(share, logits, patch)
    assert np.exp(logits - logits.max())[id] > 0


def test_categorical_returns_the_first_id_above_the_random_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = np.array([*np.log([1, 2]), NEG_INF, *np.log([3, 2])], np.float32)
    shares = [0.0, 0.1, 0.2, 0.3, 0.4, 0.7, 0.8, 0.99]
    ids = [sample_with(share, logits, monkeypatch) for share in shares]
    assert ids == [0, 0, 1, 1, 3, 3, 4, 4]


def test_each_row_is_sampled_with_its_own_key() -> None:
    logits, row_keys = mx.random.normal((50, 40), key=mx.random.key(3)), keys(50)
    batched = categorical(logits, row_keys).tolist()
    assert batched == [
        categorical(logits[n : n + 1], row_keys[n : n + 1]).item() for n in range(50)
    ]
    assert categorical(mx.broadcast_to(logits[:1], (50, 40)), row_keys).tolist() != batched[:1] * 50


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_frequencies_match_the_softmax(temperature: float) -> None:
    values = [1.0, 0.0, -1.0, 2.0]
    logits = mx.array([values] * 40_000)
    seen_mask = mx.zeros(logits.shape, dtype=mx.bool_)
    processed_logits = process_logits(logits, seen_mask, SamplingParams(temperature=temperature))
    ids = np.array(categorical(processed_logits, keys(40_000)))
    expected = probabilities([v / temperature for v in values])
    np.testing.assert_allclose(np.bincount(ids, minlength=4) / 40_000, expected, atol=0.01)


@given(
    logits_strategy, st.floats(0, sampling.MIN_TEMPERATURE, exclude_max=True), st.floats(0.01, 1e30)
)
def test_a_tiny_temperature_is_greedy(
    values: list[float], temperature: float, scale: float
) -> None:
    """Even where dividing by it would overflow, e.g. by 1e-40."""
    logits = mx.array([values]) * scale
    settings = SamplingParams(temperature=temperature, top_k=3, top_p=0.9, min_p=0.1)
    spec = SamplerSpec.from_sampling(settings, len(values))
    assert spec == SamplerSpec.from_sampling(SamplingParams(temperature=0.0), len(values))
    keys = mx.random.key(0)[None]
    ids = make_sampler(spec)(logits, mx.zeros((1, 1)), pack_sampling_params(settings), keys)
    assert np.array(ids)[0] == np.array(logits).argmax()
