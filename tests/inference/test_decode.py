from __future__ import annotations

import gc
import weakref
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxgpt.backend import device
from mlxgpt.config import Config, SamplingParams, override_config
from mlxgpt.inference import engine
from mlxgpt.inference.decode import BatchDecoder, generate_step
from mlxgpt.inference.engine import CompiledModel, NotFiniteError
from mlxgpt.inference.inspect import ForwardTrace
from mlxgpt.model.gpt import GPT
from mlxgpt.model.kv_cache import KVCache
from tests.helpers.tiny_models import make_random_model

ROTARY = {"position": "rope", "norm": "rms", "qk_norm": True, "mlp": "swiglu"}


@pytest.fixture(scope="module")
def model(tiny_model: Config) -> GPT:
    assert tiny_model.model.block_size == 8
    return make_random_model(tiny_model)


Texts = list[tuple[np.ndarray, int]]


def decode_rows(compiled: CompiledModel, texts: Texts, sampling: SamplingParams) -> list[list[int]]:
    """Decode a batch of (prompt, sample index) pairs; return the ids of each step."""
    return list(generate_step(BatchDecoder(compiled, texts, sampling)))


def record_prefills(monkeypatch: pytest.MonkeyPatch, compiled: CompiledModel) -> list[int]:
    """Record the batch size of each call of the compiled prefill."""
    batch_sizes: list[int] = []
    original = compiled._prefill

    def counting_prefill(ids: mx.array, last: mx.array) -> Any:
        batch_sizes.append(len(ids))
        return original(ids, last)

    monkeypatch.setattr(compiled, "_prefill", counting_prefill)
    return batch_sizes


def decode_tokens(
    model: GPT,
    prompt: np.ndarray,
    sampling: SamplingParams,
    vocab_size: int,
    end: int | None = None,
) -> list[list[int]]:
    """Decode all samples of one prompt; return the ids of each step."""
    texts = [(prompt, n) for n in range(sampling.samples)]
    batch = BatchDecoder(CompiledModel(model, vocab_size), texts, sampling, end)
    return list(generate_step(batch))


@pytest.mark.parametrize("parts", [{}, ROTARY])
@pytest.mark.parametrize("kind", [{"temperature": 0}, {"top_k": 5}, {"repetition_penalty": 1.3}])
def test_sequences_in_a_batch_do_not_affect_each_other(
    tiny_model: Config, parts: dict, kind: dict
) -> None:
    """Also beyond the block size, and after other rows were removed."""
    model = make_random_model(override_config(tiny_model, parts))
    compiled = CompiledModel(model, 19)
    lengths = [3, 8, 1, 5, 8, 12]
    texts = [(np.arange(n) * (n + 1) % 19, n % 2) for n in lengths]
    sampling = SamplingParams(max_tokens=30, seed=2, **kind)
    expected = [
        [row[0] for row in generate_step(BatchDecoder(compiled, [text], sampling))]
        for text in texts
    ]
    batch = BatchDecoder(compiled, texts, sampling)
    active = list(range(len(texts)))
    ids_by_text: list[list[int]] = [[] for _ in texts]
    for n, row in enumerate(generate_step(batch)):
        for index, id in zip(active, row, strict=True):
            ids_by_text[index].append(id)
        if n == 4:
            batch.filter_rows([0, 2, 3, 5])
            active = [0, 2, 3, 5]
        if n == 17:
            batch.filter_rows([3])
            active = [5]
    for index, ids in enumerate(ids_by_text):
        assert ids == expected[index][: len(ids)]
    assert [len(ids) for ids in ids_by_text] == [18, 5, 18, 18, 5, 30]


@pytest.mark.parametrize("most", [1, 2, 4])
def test_splitting_prefill_into_batches_gives_the_same_tokens(
    model: GPT, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Metal splits a batch of prompts."""
    texts = [(np.arange(n) * (n + 1) % 19, 0) for n in (3, 8, 5, 6, 7)]
    sampling = SamplingParams(max_tokens=20, seed=2, top_k=5)
    expected = decode_rows(CompiledModel(model, 19), texts, sampling)
    compiled = CompiledModel(model, 19)
    batch_sizes = record_prefills(monkeypatch, compiled)
    monkeypatch.setattr(device, "max_rows_per_batch", lambda flops: most)
    assert decode_rows(compiled, texts, sampling) == expected
    assert batch_sizes[: -(-5 // most)] == {1: [1] * 5, 2: [2, 2, 1], 4: [3, 2]}[most]


def test_shared_prompts_are_prefilled_once(monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    compiled = CompiledModel(model, 19)
    batch_sizes = record_prefills(monkeypatch, compiled)
    first, second = np.array([1, 2, 3]), np.array([4, 5])
    texts = [(first, 0), (second, 0), (first, 1), (first, 2), (second, 1)]
    rows = decode_rows(compiled, texts, SamplingParams(max_tokens=5, seed=0))
    assert batch_sizes == [2]
    assert len(set(zip(*rows, strict=True))) == 5


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize(("length", "more"), [(2, 6), (4, 4), (5, 2), (7, 1), (8, 3), (3, 20)])
def test_samples_of_one_prompt_match_single_samples(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Config, position: str, length: int, more: int
) -> None:
    """With full and partial buckets, beyond the block size, and after rows were removed."""
    model = make_random_model(override_config(tiny_model, {"position": position}))
    monkeypatch.setattr(engine, "MIN_BUCKET_SIZE", 2)
    texts = [(np.arange(length), n) for n in range(5)]
    sampling = SamplingParams(max_tokens=more, seed=2)
    expected = [decode_rows(CompiledModel(model, 19), [texts[n]], sampling) for n in (0, 3)]
    batch = BatchDecoder(CompiledModel(model, 19), texts, sampling)
    rows = generate_step(batch)
    first = next(rows)
    batch.filter_rows([0, 3])
    actual = [(first[0], first[3]), *map(tuple, rows)]
    assert actual == [(a, b) for (a,), (b,) in zip(*expected, strict=True)]


def test_one_sequence_of_a_batch_can_be_prefilled_again(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Config
) -> None:
    """Sequences reach the end of the block at different steps."""
    model = make_random_model(tiny_model)
    monkeypatch.setattr(engine, "MIN_BUCKET_SIZE", 2)
    texts = [(np.arange(n), 0) for n in (3, 5, 3, 3)]
    sampling = SamplingParams(max_tokens=20, seed=2)
    expected = [decode_rows(CompiledModel(model, 19), [text], sampling) for text in texts]
    rows = decode_rows(CompiledModel(model, 19), texts, sampling)
    assert [[ids] for ids in zip(*rows, strict=True)] == [
        [tuple(id for (id,) in single)] for single in expected
    ]


def test_cache_capacity_may_be_smaller_than_the_bucket(tiny_model: Config) -> None:
    """The cache has 64 positions, the bucket 75."""
    model = GPT(override_config(tiny_model, {"block_size": 200}).model)
    assert len(decode_tokens(model, np.arange(2), SamplingParams(max_tokens=58, seed=0), 19)) == 58


@pytest.mark.usefixtures("compiler")
def test_a_model_is_traced_only_a_few_times(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Config
) -> None:
    model = make_random_model(override_config(tiny_model, {"block_size": 256}))
    calls: list[str] = []
    original = GPT.__call__

    def counting_call(self: GPT, ids: mx.array, cache: KVCache, **kwargs: Any) -> mx.array:
        calls.append("prefill" if cache.position is None else "decode")
        return original(self, ids, cache, **kwargs)

    monkeypatch.setattr(GPT, "__call__", counting_call)
    compiled = CompiledModel(model, 19)
    for temperature, seed, length in ((0.8, 1, 250), (0.9, 2, 250), (0.7, 3, 40)):
        sampling = SamplingParams(max_tokens=length, temperature=temperature, seed=seed)
        decode_rows(compiled, [(np.array([1, seed]), 0)], sampling)
    assert calls.count("prefill") == 1
    assert calls.count("decode") <= engine.MAX_BUCKETS + 2, "two caches of the last text's length"
    call_count = len(calls)
    decode_rows(compiled, [(np.array([1, 2]), 0)], SamplingParams(max_tokens=250, seed=9))
    assert len(calls) == call_count


def test_memory_does_not_grow_with_the_length_of_the_text(model: GPT) -> None:
    sampling, active_bytes = SamplingParams(max_tokens=2000, seed=0), []
    batch = BatchDecoder(CompiledModel(model, 19), [(np.array([1]), 0)], sampling)
    for n, _ in enumerate(generate_step(batch)):
        if n % 100 == 50:
            active_bytes.append(mx.get_active_memory())
    # Active memory varies by a few kilobytes; a growing cache would add 256 bytes per token, for a
    # thousand tokens.
    assert max(active_bytes[10:]) <= max(active_bytes[:10]) + 20_000


@pytest.mark.parametrize("prompt", [1, 2, 3, 7, 8])
def test_bucket_size_does_not_change_the_tokens(
    monkeypatch: pytest.MonkeyPatch, model: GPT, prompt: int
) -> None:
    ids, sampling = np.arange(prompt), SamplingParams(max_tokens=40, seed=5, samples=2)
    expected = decode_tokens(model, ids, sampling, 19)
    monkeypatch.setattr(engine, "MIN_BUCKET_SIZE", 1)
    assert decode_tokens(model, ids, sampling, 19) == expected


def test_rotary_positions_use_a_sliding_window(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Config
) -> None:
    """With one layer this equals a full pass over the last block for each token."""
    model = GPT(override_config(tiny_model, {"position": "rope", "n_layer": 1}).model)
    model.update(tree_map(lambda p: 20 * p if p.ndim == 2 else p, model.parameters()))
    monkeypatch.setattr(engine, "MIN_BUCKET_SIZE", 2)
    batch_sizes: list[int] = []
    original = CompiledModel.prefill

    def counting_prefill(self: CompiledModel, texts: list) -> Any:
        batch_sizes.append(len(texts))
        return original(self, texts)

    monkeypatch.setattr(CompiledModel, "prefill", counting_prefill)
    generated = [
        row[0] for row in decode_tokens(model, np.arange(3), SamplingParams(40, temperature=0), 19)
    ]
    window = [0, 1, 2]
    for id in generated:
        assert id == int(model(mx.array([window[-model.config.block_size :]]))[0, -1].argmax())
        window.append(id)
    assert batch_sizes == [1]
    assert len(set(generated)) > 3


def test_settings_reach_the_sampler(model: GPT) -> None:
    prompt = np.array([1, 2])
    greedy = decode_tokens(model, prompt, SamplingParams(temperature=0, max_tokens=12), 19)
    top_one = decode_tokens(model, prompt, SamplingParams(top_k=1, max_tokens=12, seed=3), 19)
    nucleus = decode_tokens(model, prompt, SamplingParams(top_p=1e-6, max_tokens=12, seed=3), 19)
    peak = decode_tokens(model, prompt, SamplingParams(min_p=1.0, max_tokens=12, seed=3), 19)
    assert greedy == top_one == nucleus == peak
    penalized = SamplingParams(temperature=0, repetition_penalty=100.0, max_tokens=12)
    rows = [row[0] for row in decode_tokens(model, prompt, penalized, 19)]
    assert len({1, 2, *rows}) == 14, "prompt and all drawn tokens count as seen"


def test_repetition_penalty_ignores_the_initial_end_of_text(tiny_model: Config) -> None:
    """Any other token of the prompt is penalized."""

    class ConstantModel(GPT):
        def __call__(self, ids, cache, **given):  # type: ignore[no-untyped-def]
            super().__call__(ids, cache, **given)
            row = mx.where(mx.arange(self.config.vocab_size) == 5, 9.0, 1.0)
            return row[None]

    model, prompt = ConstantModel(tiny_model.model), np.array([5, 3])
    penalty = SamplingParams(1, temperature=0, repetition_penalty=100.0)
    assert decode_tokens(model, prompt, penalty, 19, 5)[0] == [5]
    assert decode_tokens(model, prompt, penalty, 19, 3)[0] != [5]
    assert decode_tokens(model, prompt, penalty, 19)[0] != [5]


def test_a_compiled_model_is_freed_without_garbage_collection(model: GPT) -> None:
    """Training creates one at each evaluation, and arrays that are freed late fragment memory."""
    gc.disable()
    try:
        compiled = CompiledModel(model, 19)
        decode_rows(compiled, [(np.zeros(4, dtype=np.int32), 0)], SamplingParams(3))
        reference = weakref.ref(compiled)
        del compiled
        assert reference() is None
    finally:
        gc.enable()


NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", [*NOT_FINITE, 1e38])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 3, "top_p": 0.9}])
def test_nonfinite_logits_are_an_error(
    tiny_model: Config, value: float, settings: dict[str, Any]
) -> None:
    """Even a single one, in a single sequence; the sampler must not return a token instead."""
    model = make_random_model(tiny_model)
    model.wte.weight[3] = value  # not a token of the prompts
    compiled = CompiledModel(model, 19)
    texts = [(np.array([1, 2]), 0), (np.array([5]), 0)]
    with pytest.raises(NotFiniteError, match="not finite"):
        decode_rows(compiled, texts, SamplingParams(max_tokens=4, seed=0, **settings))
    with pytest.raises(NotFiniteError):
        compiled.next_token_logits(np.array([1, 2]))
    with pytest.raises(NotFiniteError):
        ForwardTrace(model, 19, np.array([1, 2]))
