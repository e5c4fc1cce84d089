from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.config import Config, SamplingParams, override_config
from mlxgpt.inference import inspect
from mlxgpt.inference.decode import BatchDecoder, generate_step
from mlxgpt.inference.engine import CompiledModel, NotFiniteError
from mlxgpt.inference.inspect import EmbeddingNeighbors, ForwardTrace, sampled_probabilities
from mlxgpt.inference.sampling import NEG_INF, SamplerSpec, make_sampler, pack_sampling_params
from mlxgpt.model.gpt import GPT
from mlxgpt.model.quantized import quantize_model
from tests.helpers.tiny_models import make_random_model

IDS = np.array([3, 1, 4, 1, 5])
VOCAB_SIZE = 17  # smaller than the model's 19


@pytest.fixture(scope="module")
def model(tiny_model: Config) -> GPT:
    return make_random_model(tiny_model)


def softmax(logits: mx.array) -> np.ndarray:
    return np.array(mx.softmax(logits[..., :VOCAB_SIZE], axis=-1))


def test_logit_lens_at_each_position(model: GPT) -> None:
    trace = ForwardTrace(model, VOCAB_SIZE, IDS)
    expected = softmax(model(mx.array(IDS[None]))[0])
    for position in range(len(IDS)):
        layers = trace.logit_lens(position, 4)
        assert len(layers) == 1 + len(model.h)
        assert all(
            [share for _, share in layer] == sorted((s for _, s in layer), reverse=True)
            for layer in layers
        )
        assert [id for id, _ in layers[-1]] == np.argsort(-expected[position])[:4].tolist()
        for id, share in layers[-1]:
            assert share == pytest.approx(expected[position, id], abs=1e-5)
    assert layers[0] != layers[-1]


@pytest.mark.parametrize(
    "chosen",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1),
        SamplingParams(temperature=0.5, top_k=3),
        SamplingParams(top_p=0.5, min_p=0.1, repetition_penalty=1.5),
    ],
)
def test_sampled_probabilities_match_sampling_frequencies(
    model: GPT, chosen: SamplingParams
) -> None:

    next_logits = CompiledModel(model, VOCAB_SIZE).next_token_logits(IDS)
    candidates, probabilities = sampled_probabilities(
        chosen, next_logits, VOCAB_SIZE, IDS, VOCAB_SIZE
    )
    assert [share for _, share in candidates] == sorted((s for _, s in candidates), reverse=True)
    assert sum(share for _, share in candidates) == pytest.approx(1, abs=1e-5)
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    num_draws = 4000
    sampler = make_sampler(SamplerSpec.from_sampling(chosen, VOCAB_SIZE))
    seen_mask = np.zeros((num_draws, 19), dtype=bool)
    seen_mask[:, IDS] = True
    logits = mx.where(
        mx.arange(19) < VOCAB_SIZE, mx.broadcast_to(next_logits, (num_draws, 19)), NEG_INF
    )
    keys = mx.random.split(mx.random.key(1), num_draws)
    sampled = sampler(logits, mx.array(seen_mask), pack_sampling_params(chosen), keys)
    counts = np.bincount(np.array(sampled), minlength=19)
    for (id, _), share in zip(candidates, probabilities, strict=True):
        assert abs(counts[id] / num_draws - share) < 4 * np.sqrt(0.25 / num_draws)
        assert share > 0 or counts[id] == 0


def test_next_token_logits(model: GPT) -> None:
    """For prompts of any length, and from a ForwardTrace."""
    compiled = CompiledModel(model, VOCAB_SIZE)
    for count in (1, 3, 8, 11):
        ids = np.resize(IDS, count)
        expected = model(mx.array(ids[None, -8:]))[0, -1]
        np.testing.assert_allclose(compiled.next_token_logits(ids), expected, atol=1e-5)
    trace = ForwardTrace(model, VOCAB_SIZE, IDS)
    shares = softmax(trace.logits)
    assert trace.next_tokens(3) == [(id, shares[id]) for id in np.argsort(-shares)[:3]]


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_embedding_neighbors_are_the_nearest(
    tiny_model: Config, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By cosine similarity, with float32, 16-bit and 8-bit weights."""
    monkeypatch.setattr(inspect, "NORM_CHUNK_SIZE", 5)
    model = make_random_model(override_config(tiny_model, {"n_embd": 64}))
    if bits < 32:
        quantize_model(model, bits)
    table = np.array(model.wte(mx.arange(VOCAB_SIZE)).astype(mx.float32))
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    neighbors = EmbeddingNeighbors(model, VOCAB_SIZE)
    for id in (4, 16):
        cosines = unit @ unit[id]
        nearest = neighbors.find_nearest(id, 5)
        order = [neighbor for neighbor in np.argsort(-cosines) if neighbor != id][:5]
        assert [cosines[neighbor] for neighbor, _ in nearest] == pytest.approx(
            cosines[order], abs=0.01
        )
        assert id not in dict(nearest)
        for neighbor, share in nearest:
            assert share == pytest.approx(cosines[neighbor], abs=1e-5 if bits != 16 else 0.01)


def test_nonfinite_similarities_are_an_error(tiny_model: Config) -> None:
    model = make_random_model(tiny_model)
    model.wte.weight[3] = 1e30
    with pytest.raises(NotFiniteError):
        EmbeddingNeighbors(model, VOCAB_SIZE).find_nearest(3, 5)


def test_probabilities_while_generating(model: GPT) -> None:
    """The probabilities ignore sampling settings, and recording them does not change the ids."""
    sampling = SamplingParams(max_tokens=20, seed=3, temperature=0.7, top_k=4)
    compiled, prompt = CompiledModel(model, VOCAB_SIZE), IDS
    expected_rows = list(generate_step(BatchDecoder(compiled, [(prompt, 0)], sampling)))
    batch, text = BatchDecoder(compiled, [(prompt, 0)], sampling, top_count=6), prompt.tolist()
    rows = []
    for row in generate_step(batch):
        (probability,), (ids,), (shares,) = batch.probabilities
        window = text if len(text) <= 8 else None  # beyond the block the context is shortened
        if window:
            expected = softmax(model(mx.array([window]))[0, -1])
            assert ids == np.argsort(-expected)[:6].tolist()
            np.testing.assert_allclose(shares, expected[ids], atol=1e-4)
            assert probability == pytest.approx(expected[row[0]], abs=1e-4)
        assert probability in shares, "one of the four likeliest was drawn"
        rows.append(row)
        text += row
    assert rows == expected_rows


def test_probabilities_of_a_batch_match_those_of_a_single_sequence(model: GPT) -> None:
    sampling = SamplingParams(max_tokens=12, seed=3)
    compiled = CompiledModel(model, VOCAB_SIZE)
    single = BatchDecoder(compiled, [(IDS[:2], 0)], sampling, top_count=3)
    expected = [(row, single.probabilities) for row in generate_step(single)]
    batch = BatchDecoder(compiled, [(IDS, 0), (IDS[:2], 0)], sampling, top_count=3)
    for n, row in enumerate(generate_step(batch)):
        (ids,), probabilities = expected[n]
        assert row[-1] == ids
        for batch_values, single_values in zip(batch.probabilities, probabilities, strict=True):
            np.testing.assert_allclose(batch_values[-1], single_values[0], atol=1e-5)
        if n == 3:
            batch.filter_rows([1])
