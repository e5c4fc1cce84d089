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
from tests.helpers.tiny_models import lively

IDS = np.array([3, 1, 4, 1, 5])
KNOWN = 17  # of 19 that the model has room for


@pytest.fixture(scope="module")
def model(tiny_model: Config) -> GPT:
    return lively(tiny_model)


def softmax(logits: mx.array) -> np.ndarray:
    return np.array(mx.softmax(logits[..., :KNOWN], axis=-1))


def test_the_lens_at_each_position(model: GPT) -> None:
    trace = ForwardTrace(model, KNOWN, IDS)
    wanted = softmax(model(mx.array(IDS[None]))[0])
    for position in range(len(IDS)):
        layers = trace.logit_lens(position, 4)
        assert len(layers) == 1 + len(model.h)
        assert all(
            [share for _, share in one] == sorted((s for _, s in one), reverse=True)
            for one in layers
        )
        assert [id for id, _ in layers[-1]] == np.argsort(-wanted[position])[:4].tolist()
        for id, share in layers[-1]:
            assert share == pytest.approx(wanted[position, id], abs=1e-5)
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
def test_what_settings_leave_is_what_is_drawn_from(model: GPT, chosen: SamplingParams) -> None:
    """Drawn often, each token comes as often as that."""
    found = CompiledModel(model, KNOWN).next_token_logits(IDS)
    likely, left = sampled_probabilities(chosen, found, KNOWN, IDS, KNOWN)
    assert [share for _, share in likely] == sorted((s for _, s in likely), reverse=True)
    assert sum(share for _, share in likely) == pytest.approx(1, abs=1e-5)
    assert left.sum() == pytest.approx(1, abs=1e-5)
    draws = 4000
    sampler = make_sampler(SamplerSpec.from_sampling(chosen, KNOWN))
    seen = np.zeros((draws, 19), dtype=bool)
    seen[:, IDS] = True
    logits = mx.where(mx.arange(19) < KNOWN, mx.broadcast_to(found, (draws, 19)), NEG_INF)
    keys = mx.random.split(mx.random.key(1), draws)
    drawn = sampler(logits, mx.array(seen), pack_sampling_params(chosen), keys)
    counts = np.bincount(np.array(drawn), minlength=19)
    for (id, _), share in zip(likely, left, strict=True):
        assert abs(counts[id] / draws - share) < 4 * np.sqrt(0.25 / draws)
        assert share > 0 or counts[id] == 0


def test_what_follows_some_ids(model: GPT) -> None:
    """However many there are, and by a trace, too."""
    compiled = CompiledModel(model, KNOWN)
    for count in (1, 3, 8, 11):
        ids = np.resize(IDS, count)
        wanted = model(mx.array(ids[None, -8:]))[0, -1]
        np.testing.assert_allclose(compiled.next_token_logits(ids), wanted, atol=1e-5)
    trace = ForwardTrace(model, KNOWN, IDS)
    shares = softmax(trace.logits)
    assert trace.next_tokens(3) == [(id, shares[id]) for id in np.argsort(-shares)[:3]]


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_neighbours_are_the_nearest(
    tiny_model: Config, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one token after the other, in whatever numbers the weights are."""
    monkeypatch.setattr(inspect, "NORM_CHUNK_SIZE", 5)
    model = lively(override_config(tiny_model, {"n_embd": 64}))
    if bits < 32:
        quantize_model(model, bits)
    table = np.array(model.wte(mx.arange(KNOWN)).astype(mx.float32))
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    near = EmbeddingNeighbors(model, KNOWN)
    for id in (4, 16):
        cosines = unit @ unit[id]
        found = near.find_nearest(id, 5)
        order = [other for other in np.argsort(-cosines) if other != id][:5]
        assert [cosines[other] for other, _ in found] == pytest.approx(cosines[order], abs=0.01)
        assert id not in dict(found)
        for other, share in found:
            assert share == pytest.approx(cosines[other], abs=1e-5 if bits != 16 else 0.01)


def test_likenesses_that_are_not_finite_are_an_error(tiny_model: Config) -> None:
    model = lively(tiny_model)
    model.wte.weight[3] = 1e30
    with pytest.raises(NotFiniteError):
        EmbeddingNeighbors(model, KNOWN).find_nearest(3, 5)


def test_probabilities_while_generating(model: GPT) -> None:
    """Beyond the block, too: the probabilities of the model alone, whatever the settings; and the
    same ids as when nobody asks.
    """
    chosen = SamplingParams(max_tokens=20, seed=3, temperature=0.7, top_k=4)
    compiled, prompt = CompiledModel(model, KNOWN), IDS
    silent = list(generate_step(BatchDecoder(compiled, [(prompt, 0)], chosen)))
    batch, text = BatchDecoder(compiled, [(prompt, 0)], chosen, top_count=6), prompt.tolist()
    rows = []
    for row in generate_step(batch):
        (probability,), (ids,), (shares,) = batch.probabilities
        window = text if len(text) <= 8 else None  # then a half block was read anew
        if window:
            wanted = softmax(model(mx.array([window]))[0, -1])
            assert ids == np.argsort(-wanted)[:6].tolist()
            np.testing.assert_allclose(shares, wanted[ids], atol=1e-4)
            assert probability == pytest.approx(wanted[row[0]], abs=1e-4)
        assert probability in shares, "one of the four likeliest was drawn"
        rows.append(row)
        text += row
    assert rows == silent


def test_probabilities_of_several_that_end_at_different_times(model: GPT) -> None:
    chosen = SamplingParams(max_tokens=12, seed=3)
    compiled = CompiledModel(model, KNOWN)
    alone = BatchDecoder(compiled, [(IDS[:2], 0)], chosen, top_count=3)
    wanted = [(row, alone.probabilities) for row in generate_step(alone)]
    several = BatchDecoder(compiled, [(IDS, 0), (IDS[:2], 0)], chosen, top_count=3)
    for n, row in enumerate(generate_step(several)):
        (ids,), probabilities = wanted[n]
        assert row[-1] == ids
        for all_of_them, one in zip(several.probabilities, probabilities, strict=True):
            np.testing.assert_allclose(all_of_them[-1], one[0], atol=1e-5)
        if n == 3:
            several.filter_rows([1])
