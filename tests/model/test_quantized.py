from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxgpt.config import Config, override_config
from mlxgpt.convert import mlx_lm
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import token_losses
from mlxgpt.model.parameters import flatten_params
from mlxgpt.model.quantized import make_frozen_eval_step, quantize_model
from mlxgpt.utils.errors import UserError

MODERN = {"position": "rope", "norm": "rms", "qk_norm": True, "mlp": "swiglu", "tied": False}


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_match_mlx_lm(tiny_model: Config, bits: int) -> None:
    config = override_config(tiny_model, {"n_embd": 64}).model
    model, reference = GPT(config, 1), GPT(config, 1)
    ids = mx.random.randint(0, 19, (2, 8), key=mx.random.key(0))
    rounded = mlx_lm.fake_quantize_mlx_lm(config, flatten_params(reference.parameters()), bits)
    reference.load_weights(list(rounded.items()))
    quantize_model(model, bits)
    np.testing.assert_allclose(model(ids), reference(ids), atol=1e-4)
    assert isinstance(model.wte, nn.QuantizedEmbedding)
    assert isinstance(model.wpe, nn.Embedding)


@pytest.mark.parametrize("parts", [{}, MODERN])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_quantization_barely_changes_the_loss(tiny_model: Config, parts: dict, bits: int) -> None:
    model = GPT(override_config(tiny_model, {"n_embd": 96, "n_layer": 1, **parts}).model, 1)
    ids = mx.random.randint(0, 19, (2, 9), key=mx.random.key(0))
    x, y, mask = ids[:, :-1], ids[:, 1:], mx.ones((2, 8))
    exact_loss = float(token_losses(model(x), y).sum())
    size = sum(p.nbytes for p in flatten_params(model.parameters()).values())
    quantize_model(model, bits)
    quantized_loss = float(make_frozen_eval_step(model)(model.parameters(), x, y, mask))
    assert quantized_loss == pytest.approx(exact_loss, rel=0.02)
    assert quantized_loss != exact_loss
    assert sum(p.nbytes for p in flatten_params(model.parameters()).values()) < 0.8 * size


def test_rows_not_divisible_by_the_group_size(tiny_model: Config) -> None:
    model = GPT(override_config(tiny_model, {"n_embd": 72, "mlp": "gelu"}).model)
    quantize_model(model, 8)  # the MLP's 288 hidden dimensions are divisible by the group size
    assert isinstance(model.h[0].mlp.c_proj, nn.QuantizedLinear)
    assert isinstance(model.h[0].attn.c_proj, nn.Linear)
    with pytest.raises(UserError, match="n_embd = 20 cannot be quantized"):
        quantize_model(GPT(override_config(tiny_model, {"n_embd": 20}).model), 8)
