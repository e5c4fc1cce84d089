from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.config import Config, override_config
from mlxgpt.model.gpt import GPT
from mlxgpt.model.kv_cache import KVCache, LayersKV, pad_cache
from tests.helpers.tiny_models import make_random_model

PROMPT, LENGTH = 5, 9  # tokens of the prefill, and in total


@pytest.fixture(params=["learned", "rope"])
def model(request: pytest.FixtureRequest, tiny_model: Config) -> GPT:
    return make_random_model(
        override_config(tiny_model, {"position": request.param, "block_size": 12})
    )


@pytest.fixture
def ids() -> mx.array:
    return mx.random.randint(0, 19, (1, LENGTH), key=mx.random.key(1))


def step(
    model: GPT, attended: int, ids: mx.array, cached: tuple[LayersKV, mx.array]
) -> tuple[mx.array, LayersKV]:
    cache = KVCache(*cached, attended)
    return model(ids, cache), cache.layers


def test_cached_decoding_in_a_compiled_function_matches_the_full_pass(
    model: GPT, ids: mx.array
) -> None:
    expected, cache = model(ids), KVCache()
    np.testing.assert_allclose(model(ids[:, :PROMPT], cache), expected[:, :PROMPT], atol=1e-5)
    assert [k.shape[2] for k, _ in cache.layers] == [PROMPT] * len(model.h)
    layers: LayersKV = pad_cache(cache.layers, 12)
    for t in range(PROMPT, LENGTH):
        logits, layers = mx.compile(partial(step, model, t + 1))(
            ids[:, t : t + 1], (layers, mx.array([t]))
        )
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=1e-5)


def test_cache_positions_beyond_the_attended_length_are_not_read(model: GPT, ids: mx.array) -> None:
    cache = KVCache()
    model(ids[:, :PROMPT], cache)
    layers = pad_cache(cache.layers, 12)
    unused = mx.arange(12)[:, None] > PROMPT
    damaged = [(mx.where(unused, mx.nan, k), mx.where(unused, mx.nan, v)) for k, v in layers]
    token, position = ids[:, PROMPT : PROMPT + 1], mx.array([PROMPT])
    expected, _ = step(model, 12, token, (layers, position))
    actual, _ = step(model, PROMPT + 1, token, (damaged, position))
    np.testing.assert_allclose(actual, expected, atol=1e-5)
