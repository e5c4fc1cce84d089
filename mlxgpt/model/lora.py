"""LoRA (Hu et al., 2021) and DoRA (Liu et al., 2024): a frozen model with low-rank adapters in the
linear layers of its blocks. Rows of new tokens in the vocabulary are trained, too.

Shapes: I and O are the input and output size of a layer, r the rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxgpt.backend import ops
from mlxgpt.config import LoRAConfig
from mlxgpt.model.gpt import GPT, Embedding, Linear
from mlxgpt.model.parameters import check_shapes, flatten_params
from mlxgpt.utils.seeds import derive_seed

ADAPTED_LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class LoRALinear(Linear):
    """Linear layer x Wᵀ + scale · x a b, with a frozen weight W [O, I], a [I, r] and b [r, O].

    b is zero at first, and a uniform in ±1/√I, as in PEFT and mlx-lm.
    """

    def __init__(self, linear: Linear, rank: int, scale: float, key: mx.array) -> None:
        nn.Module.__init__(self)
        self.scale = scale
        self.weight = linear.weight
        if "bias" in linear:
            self.bias = linear.bias
        self.freeze()
        output_size, input_size = linear.weight.shape
        bound = 1 / math.sqrt(input_size)
        self.lora_a = mx.random.uniform(-bound, bound, (input_size, rank), key=key)
        self.lora_b = mx.zeros((rank, output_size))

    def __call__(self, x: mx.array) -> mx.array:  # [..., I] -> [..., O]
        return super().__call__(x) + self._adapter_output(x)

    def _adapter_output(self, x: mx.array) -> mx.array:
        return ops.linear(ops.linear(x, self.scale * self.lora_a.T), self.lora_b.T)

    def fused_weight(self) -> mx.array:
        """The weight with which a plain linear layer computes the same, [O, I]."""
        return self.weight + self.scale * (self.lora_a @ self.lora_b).T


class DoRALinear(LoRALinear):
    """LoRA whose rows are scaled to the trained norms m [O]. As in the paper, the gradient does not
    flow through the norms of W + scale · (a b)ᵀ.
    """

    def __init__(self, linear: Linear, rank: int, scale: float, key: mx.array) -> None:
        super().__init__(linear, rank, scale, key)
        self.m = row_norms(self.weight)

    def __call__(self, x: mx.array) -> mx.array:  # [..., I] -> [..., O]
        # Written as a sum, so that it is exactly the frozen layer's output at first.
        y = Linear.__call__(self, x)
        factor = self._row_factor()
        product = y - self.bias if "bias" in self else y
        return (
            y
            + (factor - 1).astype(x.dtype) * product
            + factor.astype(x.dtype) * self._adapter_output(x)
        )

    def fused_weight(self) -> mx.array:
        return self._row_factor()[:, None] * super().fused_weight()

    def _row_factor(self) -> mx.array:
        return self.m / mx.stop_gradient(row_norms(super().fused_weight()))


def row_norms(weight: mx.array) -> mx.array:
    """Euclidean norms of the rows of a weight [O, I], float32 [O]."""
    return mx.linalg.norm(weight.astype(mx.float32), axis=1)


class ExtendedEmbedding(Embedding):
    """Embedding table with a frozen weight [V, C], but for the trained rows of `new_tokens`."""

    def __init__(self, table: Embedding | Linear, new_tokens: range) -> None:
        nn.Module.__init__(self)
        self.new_tokens = new_tokens
        self.weight = table.weight
        self.freeze()
        rows = table.weight[new_tokens.start : new_tokens.stop]
        self.new_rows = rows.astype(mx.float32)

    def __call__(self, ids: mx.array) -> mx.array:  # [...] -> [..., C]
        first, last = self.new_tokens[0], self.new_tokens[-1]
        new_rows = ops.embedding(self.new_rows, mx.clip(ids, first, last) - first)
        is_new = ((ids >= first) & (ids <= last))[..., None]
        return mx.where(is_new, new_rows, super().__call__(ids))

    def as_linear(self, x: mx.array) -> mx.array:
        """Product of x [..., C] and the transposed table: [..., V]."""
        logits, new_logits = super().as_linear(x), ops.linear(x, self.new_rows)
        first, stop = self.new_tokens.start, self.new_tokens.stop
        return mx.concatenate([logits[..., :first], new_logits, logits[..., stop:]], axis=-1)

    def fused_weight(self) -> mx.array:
        """The table with the trained rows, [V, C]."""
        first, stop = self.new_tokens.start, self.new_tokens.stop
        return mx.concatenate([self.weight[:first], self.new_rows, self.weight[stop:]])


class ExtendedHead(ExtendedEmbedding):
    """Output head with a frozen weight [V, C], but for the trained rows of new tokens."""

    def __call__(self, x: mx.array) -> mx.array:  # [..., C] -> [..., V]
        return self.as_linear(x)


def add_lora(
    model: GPT, config: LoRAConfig, *, seed: int = 0, new_tokens: range = range(0)
) -> None:
    """Freeze a model, and add trainable adapters to it in place.

    Args:
        seed: determines the initial adapters.
        new_tokens: ids whose rows of the vocabulary's matrices are trained.
    """
    model.freeze()
    layer_class = DoRALinear if config.dora else LoRALinear
    modules: dict[str, nn.Module] = {}
    for name, linear in _find_adapted_layers(model, config):
        key = mx.random.key(derive_seed(seed, f"lora {name}"))
        modules[name] = layer_class(linear, config.lora_rank, config.lora_scale, key)
    if new_tokens:
        for name, module in model.named_modules():
            if isinstance(module, Embedding):
                modules[name] = ExtendedEmbedding(module, new_tokens)
        if "lm_head" in model:
            modules["lm_head"] = ExtendedHead(model.lm_head, new_tokens)
    model.update_modules(tree_unflatten(list(modules.items())))


def _find_adapted_layers(model: GPT, config: LoRAConfig) -> Iterator[tuple[str, Linear]]:
    """Name and layer of each linear layer that gets an adapter."""
    modules = dict(model.named_modules())
    for layer in config.adapted_blocks(len(model.h)):
        for name in ADAPTED_LAYERS:
            yield f"h.{layer}.{name}", cast(Linear, modules[f"h.{layer}.{name}"])


def fuse_adapters(
    model: GPT, config: LoRAConfig, adapters: Mapping[str, mx.array], new_tokens: range = range(0)
) -> bool:
    """Change a model's weights in place to those with trained adapters; returns whether any did.

    Args:
        adapters: float32 arrays by dotted name, as in a checkpoint of the adapters.
        new_tokens: see `add_lora`.

    Raises:
        UserError: if their names or shapes do not fit the model.
    """
    base = flatten_params(model.parameters())
    adapted = GPT(model.config)
    adapted.update(tree_unflatten(list(base.items())))
    add_lora(adapted, config, new_tokens=new_tokens)
    check_shapes(dict(adapters), flatten_params(adapted.trainable_parameters()))
    adapted.update(tree_unflatten(list(adapters.items())))
    fused = {
        f"{name}.weight": module.fused_weight()
        for name, module in adapted.named_modules()
        if isinstance(module, LoRALinear | ExtendedEmbedding)
    }
    model.update(tree_unflatten(list(fused.items())))
    has_b = any(bool(value.any()) for name, value in adapters.items() if name.endswith(".lora_b"))
    return has_b or not all(bool(mx.array_equal(fused[name], base[name])) for name in fused)
