"""Initial weights of a new model, as in GPT-2."""

from __future__ import annotations

import math
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxgpt.config import ModelConfig
from mlxgpt.model.parameters import flatten_params
from mlxgpt.model.rope import rope_frequencies
from mlxgpt.utils.seeds import derive_seed

INIT_STD = 0.02  # standard deviation of weights, as in GPT-2


def init_parameters(model: nn.Module, config: ModelConfig, seed: int) -> dict[str, Any]:
    """GPT-2's initial weights: N(0, 0.02), residual projections scaled by 1/√(2·n_layer), biases 0,
    norms 1. All logits are then near 0, and the first loss is near ln V.
    """
    parameters = flatten_params(model.parameters())
    keys = mx.random.split(mx.random.key(derive_seed(seed, "init")), len(parameters))
    residual_scale = 1 / math.sqrt(2 * config.n_layer)
    values = {}
    for (name, old), key in zip(parameters.items(), keys, strict=True):
        if old.ndim >= 2:
            std = INIT_STD * (residual_scale if name.endswith("c_proj.weight") else 1)
            new = std * mx.random.normal(old.shape, key=key)
        else:
            new = mx.zeros(old.shape) if name.endswith("bias") else mx.ones(old.shape)
        values[name] = new
    if config.induction_head:
        _add_induction_head(values, config, mx.random.key(derive_seed(seed, "induction head")))
    return cast(dict[str, Any], tree_unflatten(values))


NEAR_PAIRS = 5  # pairs of dimensions that rotate fastest, which tell neighbors apart
CONSTANT = 2.0  # first channel of all embeddings; the others start near 0


def _add_induction_head(values: dict[str, mx.array], config: ModelConfig, key: mx.array) -> None:
    """Let the first heads of the first two blocks find what followed an earlier occurrence of the
    current token (induction heads, Olsson et al., 2022), which otherwise takes long to learn. With
    one block, one head or learned positions this is not possible, and nothing is changed.

    Weights that start as training would make them: mimetic initialization (Trockman & Kolter,
    2023). C: n_embd, D: C / n_head.
    """
    C, D = config.n_embd, config.n_embd // config.n_head
    if min(config.n_layer, config.n_head) < 2 or config.position != "rope":
        return
    # MLX has no QR decomposition on GPUs.
    basis, _ = mx.linalg.qr(mx.random.normal((C, C), key=key), stream=mx.cpu)
    basis[:, 0] = 0  # the constant channel, below
    source, copy = basis[:D], basis[D : 2 * D]  # [D, C], orthogonal to each other

    # Block 0 copies the previous token's embedding. From a channel that is the same for all tokens,
    # query and key are the same at all positions, except that RoPE rotates them. The key is turned
    # by one position beforehand, so that they agree if it is one position behind.
    values["wte.weight"][:, 0] = CONSTANT
    angles = rope_frequencies(D)[:NEAR_PAIRS]
    pairs = len(angles)
    query_direction, key_direction = mx.zeros(D), mx.zeros(D)
    query_direction[:pairs] = pairs**-0.5
    key_direction[:pairs] = mx.cos(angles) * pairs**-0.5
    key_direction[D // 2 : D // 2 + pairs] = mx.sin(angles) * pairs**-0.5
    is_constant = mx.arange(C) == 0
    attention = values["h.0.attn.c_attn.weight"]  # [3·C, C]
    attention[:D] = query_direction[:, None] * is_constant
    attention[C : C + D] = key_direction[:, None] * is_constant
    attention[2 * C : 2 * C + D] = source
    values["h.0.attn.c_proj.weight"][:, :D] = copy.T

    # Block 1 attends where the copy is of the current token, with the dimensions that rotate least.
    half = D // 2
    slow = mx.concatenate([mx.arange(half // 2, half), half + mx.arange(half // 2, half)])
    attention = values["h.1.attn.c_attn.weight"]
    attention[slow] = source[: len(slow)]
    attention[C + slow] = copy[: len(slow)]
