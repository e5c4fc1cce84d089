from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxgpt.backend import ops
from mlxgpt.config import Config, ModelConfig, override_config
from mlxgpt.data.token_array import Batch
from mlxgpt.model.gpt import GPT, MLP
from mlxgpt.model.kv_cache import KVCache, pad_cache
from mlxgpt.model.losses import token_losses
from mlxgpt.model.parameters import flatten_params
from mlxgpt.model.rope import apply_rope
from mlxgpt.model.stats import count_parameters, flops_per_token, mlp_width
from mlxgpt.training.step import TrainStep
from tests.oracle import reference
from tests.oracle.reference import model_and_batch


def test_logits_match_transformers_gpt2() -> None:
    model, ids, reference = model_and_batch()
    np.testing.assert_allclose(model(ids[:, :-1]), reference["logits"], atol=2e-5)


def test_loss_and_gradients_match_transformers_gpt2() -> None:
    model, ids, reference = model_and_batch()
    config = override_config(Config(model=model.config), {"dtype": "float32", "dropout": 0.0})
    loss, gradients = TrainStep(model, config).compute_gradients(
        Batch(ids[None, :, :-1], ids[None, :, 1:]), mx.random.key(0)
    )
    assert float(loss) == pytest.approx(float(reference["loss"]), abs=1e-5)
    actual = flatten_params(gradients)
    assert len(actual) == sum(name.startswith("gradient:") for name in reference)
    for name, gradient in actual.items():
        np.testing.assert_allclose(gradient, reference[f"gradient:{name}"], atol=2e-5, err_msg=name)


MODERN = {
    "position": "rope",
    "norm": "rms",
    "qk_norm": True,
    "mlp": "swiglu",
    "bias": False,
}
PARTS = [
    {"bias": True},
    {"bias": False},
    {"position": "rope"},
    {"norm": "rms"},
    {"norm": "rms", "bias": False},
    {"qk_norm": True},
    {"mlp": "relu2"},
    {"mlp": "swiglu"},
    {"tied": False},
    {"embedding_norm": True},
    {"value_embeddings": True},
    {"value_embeddings": True, "value_gate": True},
    {"smear": True},
    {"token_shift": True},
    MODERN,
    {**MODERN, "tied": False, "embedding_norm": True},
    {**MODERN, "tied": False, "embedding_norm": True, "value_embeddings": True},
    {**MODERN, "value_embeddings": True, "value_gate": True, "smear": True},
    {**MODERN, "value_embeddings": True, "smear": True, "token_shift": True},
]


@pytest.mark.parametrize("parts", PARTS)
def test_count_parameters_matches_the_model(tiny_model: Config, parts: dict) -> None:
    config = override_config(tiny_model, parts).model
    values = flatten_params(GPT(config).parameters()).values()
    assert count_parameters(config) == sum(value.size for value in values)


def test_gpt2_small_has_124_million_parameters() -> None:
    assert count_parameters(ModelConfig(vocab_size=50257)) == 124_439_808
    # The same count as in Hugging Face; FLOPs by the formula of the PaLM paper.
    assert (
        flops_per_token(ModelConfig(vocab_size=50257))
        == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    )


@pytest.mark.parametrize(
    ("n_layer", "n_embd", "vocab_size"),
    [(1, 32, 65), (4, 144, 65), (6, 384, 4096), (12, 96, 50257)],
)
def test_initial_loss_is_ln_v(n_layer: int, n_embd: int, vocab_size: int) -> None:
    config = ModelConfig(
        n_layer=n_layer, n_head=4, n_embd=n_embd, block_size=64, vocab_size=vocab_size
    )
    ids = mx.random.randint(0, vocab_size, (4, 65), key=mx.random.key(1))
    loss = float(token_losses(GPT(config)(ids[:, :-1]), ids[:, 1:]).mean())
    assert loss == pytest.approx(math.log(vocab_size), rel=0.05)
    assert loss == pytest.approx(math.log(vocab_size) + 0.0002 * n_embd, rel=0.015)


def test_the_model_uses_dropout_only_with_a_key(tiny_model: Config) -> None:
    model = GPT(tiny_model.model)
    ids = mx.array([[1, 2, 3, 4]])
    assert (model(ids) == model(ids)).all()
    outputs = [model(ids, key=mx.random.key(n)) for n in (0, 0, 1)]
    assert (outputs[0] == outputs[1]).all()
    assert not (outputs[0] == outputs[2]).all()
    assert not (outputs[0] == model(ids)).all()


def test_gradient_checkpointing_gives_the_same_gradients_with_dropout(tiny_model: Config) -> None:
    ids = mx.random.randint(0, 19, (1, 4, 9), key=mx.random.key(1))
    gradients = []
    for checkpointing in (False, True):
        model = GPT(tiny_model.model, 5, gradient_checkpointing=checkpointing)
        step = TrainStep(model, tiny_model)
        gradients.append(
            flatten_params(
                step.compute_gradients(Batch(ids[..., :-1], ids[..., 1:]), mx.random.key(2))[1]
            )
        )
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradient, gradients[1][name], atol=1e-7, err_msg=name)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("shape", [(2, 16, 65), (4, 144, 65), (3, 64, 2048)])
def test_initial_loss_is_near_ln_v_for_all_architectures(
    tiny_model: Config, parts: dict, shape: tuple[int, int, int]
) -> None:
    layers, width, vocabulary = shape
    changes = {"n_layer": layers, "n_embd": width, "vocab_size": vocabulary, "block_size": 32}
    model = GPT(override_config(tiny_model, {**changes, **parts}).model, 3)
    ids = mx.random.randint(0, vocabulary, (4, 33), key=mx.random.key(1))
    loss = float(token_losses(model(ids[:, :-1]), ids[:, 1:]).mean())
    assert loss == pytest.approx(math.log(vocabulary), rel=0.05)


@pytest.mark.parametrize("parts", PARTS)
def test_cached_and_padded_logits_match_the_full_pass(tiny_model: Config, parts: dict) -> None:
    model = GPT(override_config(tiny_model, {"block_size": 12, **parts}).model, 1)
    ids = mx.random.randint(0, 19, (3, 12), key=mx.random.key(1))
    expected = model(ids)
    # Five tokens padded to eight; decoding overwrites the padding.
    padded = mx.concatenate([ids[:, :5], mx.full((3, 3), 18)], axis=1)
    cache = KVCache()
    logits = model(padded, cache, last=mx.array([4]))
    np.testing.assert_allclose(logits, expected[:, 4], atol=1e-5)
    layers = pad_cache(cache.layers, 12)
    for t in range(5, 12):
        cache = KVCache(layers, mx.array([t]))
        logits, layers = model(ids[:, t : t + 1], cache), cache.layers
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=1e-5)


@pytest.mark.parametrize("parts", PARTS)
def test_sequences_of_different_lengths_in_one_cache(tiny_model: Config, parts: dict) -> None:
    model = GPT(override_config(tiny_model, {"block_size": 12, **parts}).model, 1)
    ids = mx.random.randint(0, 19, (3, 12), key=mx.random.key(1))
    expected, lengths, rows = model(ids), mx.array([1, 4, 6]), mx.arange(3)
    cache = KVCache()
    logits = model(ids[:, :6], cache, last=lengths - 1)
    np.testing.assert_allclose(logits, expected[rows, lengths - 1], atol=1e-5)
    layers = pad_cache(cache.layers, 12)
    first_keys = mx.array(layers[0][0])
    for _ in range(6):
        cache = KVCache(layers, lengths)
        logits = model(ids[rows, lengths][:, None], cache)[:, 0]
        np.testing.assert_allclose(logits, expected[rows, lengths], atol=1e-5)
        assert mx.array_equal(layers[0][0], first_keys), "what was given stays as it is"
        layers, first_keys = cache.layers, mx.array(cache.layers[0][0])
        lengths = lengths + 1


def shift_slow_half(k: mx.array) -> mx.array:
    """Keys [B, H, T, D], where dimensions D/4 to D/2 and 3D/4 to D are the previous token's."""
    quarters = [*mx.split(k, 4, axis=-1)]
    for n in (1, 3):
        zeros = mx.zeros_like(quarters[n][:, :, :1])
        quarters[n] = mx.concatenate([zeros, quarters[n][:, :, :-1]], axis=2)
    return mx.concatenate(quarters, axis=-1)


def windowed_logits(model: GPT, ids: mx.array, window: int) -> mx.array:
    """Logits of ids [B, T] of any length T, where each token in each layer attends to the last
    `window` positions.
    """
    positions = mx.arange(ids.shape[1])
    distances = positions[:, None] - positions
    mask = (distances >= 0) & (distances < window)
    x = model.wte(ids)
    if model.config.smear:
        x = model.smear(x)
    for block in model.h:
        attn, (B, T, C) = block.attn, x.shape
        x_in = block.ln_1(x)
        if model.config.token_shift:
            x_in = attn.smear(x_in)
        qkv = attn.c_attn(x_in).reshape(B, T, 3, attn.n_head, -1)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        q, k = (mx.fast.rms_norm(heads, None, 1e-5) for heads in (q, k))
        if model.config.token_shift:
            k = shift_slow_half(k)
        q, k = apply_rope(q, 0), apply_rope(k, 0)
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
        shares = mx.softmax(mx.where(mask, scores, -mx.inf), axis=-1)
        x = x + attn.c_proj((shares @ v).swapaxes(1, 2).reshape(B, T, C))
        x = x + block.mlp(block.ln_2(x))
    return model.wte.as_linear(model.ln_f(x))


@pytest.mark.parametrize("parts", [(), ("smear",), ("token_shift",), ("smear", "token_shift")])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_full_cache_is_a_sliding_window_in_each_layer(
    tiny_model: Config, layers: int, parts: tuple[str, ...]
) -> None:
    changes = {**MODERN, "block_size": 8, "n_layer": layers, **dict.fromkeys(parts, True)}
    model = GPT(override_config(tiny_model, changes).model, 1)
    assert model.supports_sliding_window
    # Large weights, so that every layer affects the logits.
    model.update(tree_map(lambda p: 10 * p if p.ndim == 2 else p, model.parameters()))
    ids = mx.random.randint(0, 19, (2, 40), key=mx.random.key(1))
    expected = windowed_logits(model, ids, 8)
    cache = KVCache()
    logits = model(ids[:, :1], cache, last=mx.array([0]))
    np.testing.assert_allclose(logits, expected[:, 0], atol=1e-4)
    cached = pad_cache(cache.layers, 8)
    for t in range(1, 40):
        cache = KVCache(cached, mx.array([t]))
        logits, cached = model(ids[:, t : t + 1], cache)[:, 0], cache.layers
        np.testing.assert_allclose(logits, expected[:, t], atol=1e-4)
    uncached = model(ids[:, -8:])[:, -1]
    # More layers, and shifted vectors, also see tokens before the window.
    assert mx.allclose(logits, uncached, atol=1e-4).item() == (layers == 1 and not parts)


def test_embedding_lookups_add_no_flops(tiny_model: Config) -> None:
    plain = tiny_model.model
    untied = override_config(tiny_model, {"tied": False}).model
    with_value_embeddings = override_config(tiny_model, {"value_embeddings": True}).model
    assert (
        flops_per_token(plain) == flops_per_token(untied) == flops_per_token(with_value_embeddings)
    )
    assert (
        count_parameters(plain) < count_parameters(untied) < count_parameters(with_value_embeddings)
    )


def test_an_untied_output_head_is_not_the_embedding(tiny_model: Config) -> None:
    model = GPT(override_config(tiny_model, {"tied": False}).model)
    ids = mx.array([[1, 2, 3]])
    before = model(ids)
    model.lm_head.weight = 2 * model.lm_head.weight
    np.testing.assert_allclose(model(ids), 2 * before, rtol=1e-5)


def test_embedding_norm_removes_the_scale_of_the_embedding(tiny_model: Config) -> None:
    changes = {"tied": False, "embedding_norm": True, "position": "rope"}
    model = GPT(override_config(tiny_model, changes).model)
    ids = mx.array([[1, 2, 3]])
    before = model(ids)
    model.wte.weight = 7 * model.wte.weight
    np.testing.assert_allclose(model(ids), before, atol=1e-4)


def test_value_embeddings_are_added_to_the_attention_values(
    tiny_model: Config, monkeypatch: pytest.MonkeyPatch
) -> None:

    model = GPT(
        override_config(tiny_model, {"value_embeddings": True, "n_layer": 1, "n_head": 2}).model
    )
    ids = mx.array([[3, 1, 3]])
    attention, x = model.h[0].attn, mx.random.normal((1, 3, 16), key=mx.random.key(1))
    rows = model.wve[0](ids)
    recorded_values: list[mx.array] = []
    original = ops.causal_attention

    def recording_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        recorded_values.append(v)
        return original(q, k, v)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "causal_attention", recording_attention)
        for token_values in (None, rows):
            attention(x, token_values)
    plain, values = recorded_values
    np.testing.assert_allclose((values - plain).swapaxes(1, 2).reshape(1, 3, 16), rows, atol=1e-6)
    changed = model(ids)
    model.wve[0].weight[2] = 100.0  # a token that is not in ids
    assert (model(ids) == changed).all()
    model.wve[0].weight[1] = 100.0
    assert (model(ids)[0, 0] == changed[0, 0]).all()
    assert not (model(ids)[0, 1] == changed[0, 1]).all()


def test_value_gate_scales_value_embeddings_per_head(tiny_model: Config) -> None:
    changes = {"value_embeddings": True, "value_gate": True, "n_layer": 5, "n_head": 2}
    model = GPT(override_config(tiny_model, changes).model)
    assert [block.attn.get("value_gate") is not None for block in model.h] == [1, 0, 1, 0, 1]
    assert len(model.wve) == 3
    attention, x = model.h[0].attn, mx.random.normal((1, 3, 16), key=mx.random.key(1))
    rows = model.wve[0](mx.array([[3, 1, 3]]))
    gate = 3 * mx.sigmoid(x[..., :12] @ attention.value_gate.weight.T)  # [1, 3, 2]
    scaled_rows = (rows.reshape(1, 3, 2, 8) * gate[..., None]).reshape(1, 3, 16)
    actual = attention(x, rows)
    del attention["value_gate"]
    np.testing.assert_allclose(actual, attention(x, scaled_rows), atol=1e-6)


def test_smear_adds_a_gated_share_of_the_previous_embedding(tiny_model: Config) -> None:
    smear = GPT(override_config(tiny_model, {"smear": True, "n_embd": 32}).model).smear
    x = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    gate = 1 / (1 + np.exp(-x[..., :24] @ np.array(smear.gate.weight).T))  # [2, 5, 1]
    expected = x.copy()
    expected[:, 1:] += gate[:, 1:] * x[:, :-1]
    np.testing.assert_allclose(smear(mx.array(x)), expected, atol=1e-6)


def test_token_shift_smears_the_input_and_moves_half_of_each_key(tiny_model: Config) -> None:
    changes = {**MODERN, "token_shift": True, "n_embd": 32}
    attention = GPT(override_config(tiny_model, changes).model, 1).h[0].attn
    attention.update(tree_map(lambda p: 20 * p, attention.parameters()))
    x = mx.random.normal((2, 7, 32), key=mx.random.key(1))
    H, D = attention.n_head, 32 // attention.n_head
    qkv = attention.c_attn(attention.smear(x)).reshape(2, 7, 3, H, D)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    q, k = (mx.fast.rms_norm(heads, None, 1e-5) for heads in (q, k))
    q, k = apply_rope(q, 0), apply_rope(shift_slow_half(k), 0)
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5, mask="causal")
    expected = attention.c_proj(y.swapaxes(1, 2).reshape(2, 7, 32))
    np.testing.assert_allclose(attention(x), expected, atol=1e-4)


def test_reference_arrays_are_small() -> None:
    assert reference.FILE.stat().st_size < 100_000


def test_rope_depends_only_on_relative_positions(tiny_model: Config) -> None:

    q, k = mx.random.normal((2, 1, 1, 1, 8), key=mx.random.key(0))

    def product(query_position: int, key_position: int) -> float:
        return float((apply_rope(q, query_position) * apply_rope(k, key_position)).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), rel=1e-3)
    assert product(7, 3) != pytest.approx(product(8, 3), rel=1e-2)
    np.testing.assert_allclose(mx.linalg.norm(apply_rope(q, 9)), mx.linalg.norm(q), rtol=1e-5)


def test_a_shared_rope_offset_is_a_scalar(
    tiny_model: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX's GPU kernels read beyond an offset of shape [1] if B > 1 (seen on CUDA)."""
    model = GPT(override_config(tiny_model, MODERN).model)
    ids = mx.array([[1, 2, 3], [4, 5, 6]])
    offsets: list[mx.array | int] = []
    rope = mx.fast.rope

    def recording_rope(x: mx.array, *args: Any, offset: mx.array | int, **kwargs: Any) -> mx.array:
        offsets.append(offset)
        return rope(x, *args, offset=offset, **kwargs)

    monkeypatch.setattr(mx.fast, "rope", recording_rope)
    cache = KVCache()
    model(ids, cache, last=mx.array([2]))
    for position in (mx.array([3]), mx.array([3, 2])):
        model(ids[:, :1], KVCache(pad_cache(cache.layers, 8), position))
    assert len(offsets) == 3 * 2 * 2, "two layers' queries and keys, three times"
    assert all(isinstance(at, int) or at.shape in ((), (2,)) for at in offsets)


def test_mlps_match_numpy(tiny_model: Config) -> None:
    x = mx.random.normal((3, 16), key=mx.random.key(4))
    for kind in ("relu2", "swiglu"):
        mlp = MLP(override_config(tiny_model, {"mlp": kind, "bias": False}).model)
        hidden = np.array(x @ mlp.c_fc.weight.T)
        if kind == "relu2":
            hidden = np.maximum(hidden, 0) ** 2
        else:
            gate, value = np.split(hidden, 2, axis=-1)
            hidden = gate / (1 + np.exp(-gate)) * value
        expected = hidden @ np.array(mlp.c_proj.weight).T
        np.testing.assert_allclose(mlp(x), expected, atol=1e-6, err_msg=kind)
    assert mlp_width(override_config(tiny_model, {"mlp": "swiglu", "n_embd": 384}).model) == 1024


def test_qk_norm_removes_the_scale_of_queries_and_keys(tiny_model: Config) -> None:
    """Scaling their weights by ten changes the logits only without `qk_norm`."""
    for qk_norm in (True, False):
        model = GPT(override_config(tiny_model, {"qk_norm": qk_norm, "bias": False}).model)
        ids = mx.arange(8)[None]
        before = model(ids)
        for block in model.h:
            block.attn.c_attn.weight = mx.concatenate(
                [10 * block.attn.c_attn.weight[:32], block.attn.c_attn.weight[32:]]
            )
        difference = float(mx.abs(model(ids) - before).max())
        assert (difference < 1e-4) == qk_norm
