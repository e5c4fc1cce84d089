from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.config import ModelConfig
from mlxgpt.model.activations import ActivationRecorder
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import token_losses
from mlxgpt.model.parameters import flatten_params


def test_initial_weights_match_gpt2() -> None:
    config = ModelConfig(n_layer=8, n_head=4, n_embd=128, block_size=64, vocab_size=300)
    for name, value in flatten_params(GPT(config, seed=3).parameters()).items():
        array = np.array(value)
        if array.ndim == 1:
            assert (array == (0 if name.endswith("bias") else 1)).all(), name
        else:
            std = 0.02 / (math.sqrt(16) if name.endswith("c_proj.weight") else 1)
            assert array.std() == pytest.approx(std, rel=0.05), name
            assert abs(array.mean()) < std / 10, name


def test_initial_weights_depend_on_the_seed() -> None:
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=5)
    same = [flatten_params(GPT(config, seed).parameters()) for seed in (1, 1, 2)]
    for name, value in same[0].items():
        assert (value == same[1][name]).all()
    assert not (same[0]["wte.weight"] == same[2]["wte.weight"]).any()


@pytest.mark.parametrize("shape", [(2, 2, 128), (6, 6, 384), (2, 4, 128)])
def test_an_induction_head_attends_to_what_followed_the_same_token(
    shape: tuple[int, int, int],
) -> None:
    layers, heads, width = shape
    options: dict[str, Any] = {"n_layer": layers, "n_head": heads, "n_embd": width}
    options |= {"block_size": 80, "vocab_size": 300, "dropout": 0.0, "bias": False}
    options |= {"position": "rope", "norm": "rms", "qk_norm": True, "embedding_norm": True}
    options |= {"mlp": "swiglu", "tied": False}
    half = np.random.default_rng(1).permutation(300)[:40]
    ids = mx.array(np.concatenate([half, half]))[None]  # every token twice, 40 apart
    previous, following, losses = [], [], []
    for is_on in (False, True):
        model = GPT(ModelConfig(**options, induction_head=is_on), seed=3)
        losses.append(float(token_losses(model(ids)[:, :-1], ids[:, 1:]).mean()))
        model.wte.weight[:, 1:] *= 50  # as large as after the first steps
        recorder = ActivationRecorder()
        model(ids, recorder=recorder)
        first, second = (np.array(recorder.attention[layer])[0, 0] for layer in (0, 1))  # [T, T]
        previous.append(np.diagonal(first, -1).mean())
        following.append(np.diagonal(second, -39).mean())
    assert previous[0] < 0.1
    assert previous[1] > 0.4
    assert (first[1:].argmax(1) == np.arange(79)).all()
    assert following[0] < 0.05
    assert following[1] > 5 * following[0]
    np.testing.assert_allclose(losses, math.log(300), atol=0.2)


def test_no_induction_head_where_it_is_not_possible() -> None:
    for change in ({"n_layer": 1}, {"n_head": 1}, {"position": "learned"}):
        options: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 5}
        options |= {"position": "rope", **change}
        models = [GPT(ModelConfig(**options, induction_head=is_on)) for is_on in (False, True)]
        first, second = (flatten_params(model.parameters()) for model in models)
        for name, value in first.items():
            assert (value == second[name]).all(), name


def test_the_qr_decomposition_is_not_computed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX refuses it there, with the default stream."""
    real = mx.linalg.qr

    def qr_of_a_gpu(a: mx.array, *, stream: object = None) -> Any:
        if stream != mx.cpu:
            raise ValueError("[linalg::qr] This op is not yet supported on the GPU.")
        return real(a, stream=mx.cpu)

    monkeypatch.setattr(mx.linalg, "qr", qr_of_a_gpu)
    shape: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 5}
    GPT(ModelConfig(**shape, position="rope", induction_head=True))
