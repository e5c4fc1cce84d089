"""GPT-2 (Radford et al., 2019): token ids -> logits, with or without a cache. The config may choose
other parts, found since: rotary positions, RMS norms, normalised queries and keys, other MLPs.

Names and shapes are GPT-2's. B: sequences, T: tokens, C: n_embd, H: heads, D: C / H, V: vocabulary.
There is no train or eval mode: dropout happens where a random key is given, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt.backend import ops
from mlxgpt.config import ModelConfig
from mlxgpt.errors import UserError
from mlxgpt.model.counting import mlp_width
from mlxgpt.model.dropout import Key, dropout, split
from mlxgpt.model.inside import Inside
from mlxgpt.seeds import derive

INIT_STD = 0.02
ROPE_BASE = 10_000.0
HEADS = ("wte.weight", "lm_head.weight")  # arrays with a row for each token, [V, C]

# Keys and values of a layer, [B, H, length, D] each, and of all layers.
LayerCache = tuple[mx.array, mx.array]
Cache = list[LayerCache]


class Linear(nn.Linear):
    """A matrix[O, I], and a bias if it has one."""

    def __call__(self, x: mx.array) -> mx.array:  # [..., I] -> [..., O]
        return ops.linear(x, self.weight, self.get("bias"))


class Embedding(nn.Embedding):
    """A row[C] for each id."""

    def __call__(self, ids: mx.array) -> mx.array:  # [...] -> [..., C]
        return ops.embedding(self.weight, ids)


class LayerNorm(nn.LayerNorm):
    """Each vector brought to mean 0 and variance 1 (Ba et al., 2016), with a gain."""

    def __call__(self, x: mx.array) -> mx.array:  # [..., C] -> [..., C]
        return ops.layer_norm(x, self.weight, self.get("bias"))


class RMSNorm(nn.Module):
    """Each vector brought to a root mean square of 1 (Zhang & Sennrich, 2019); with a gain, unless
    the matrix behind it can have that.
    """

    def __init__(self, size: int, *, gain: bool) -> None:
        super().__init__()
        if gain:
            self.weight = mx.ones(size)

    def __call__(self, x: mx.array) -> mx.array:  # [..., C] -> [..., C]
        return ops.rms_norm(x, self.get("weight"))


def make_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """The norm before a sublayer."""
    if config.norm == "rms":
        return RMSNorm(config.n_embd, gain=False)
    return LayerNorm(config.n_embd, bias=config.bias)


class CausalSelfAttention(nn.Module):
    """Every position looks at itself and those before it, with H heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.rope = config.position == "rope"
        self.qk_norm = config.qk_norm
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def _heads(
        self, x: mx.array, token_values: mx.array | None, position: mx.array | int = 0
    ) -> tuple[mx.array, mx.array, mx.array]:
        B, T, C = x.shape
        qkv = self.c_attn(x).reshape(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each [B, H, T, D]
        if token_values is not None:
            shape = B, T, self.n_head, C // self.n_head
            v = v + token_values.reshape(shape).swapaxes(1, 2)
        if self.qk_norm:
            q, k = ops.rms_norm(q), ops.rms_norm(k)
        if self.rope:
            q, k = rotated(q, position), rotated(k, position)
        return q, k, v

    def _merge(self, y: mx.array) -> mx.array:
        B, H, T, D = y.shape
        return self.c_proj(y.transpose(0, 2, 1, 3).reshape(B, T, H * D))

    def __call__(self, x: mx.array, token_values: mx.array | None = None) -> mx.array:
        """[B, T, C] -> [B, T, C]; `token_values` [B, T, C] are added to the values."""
        return self.prefill(x, token_values)[0]

    def prefill(
        self, x: mx.array, token_values: mx.array | None, inside: Inside | None = None
    ) -> tuple[mx.array, LayerCache]:
        """As `__call__`, and the keys and values of these T tokens."""
        q, k, v = self._heads(x, token_values)
        y = ops.causal_attention(q, k, v)
        if inside is not None:
            y = inside.attended(q, k, y)
        return self._merge(y), (k, v)

    def decode(
        self,
        x: mx.array,
        token_values: mx.array | None,
        cache: LayerCache,
        position: mx.array,
        seen: mx.array,
        prompt: LayerCache | None,
    ) -> tuple[mx.array, LayerCache]:
        """As `__call__`, for the one token of each sequence at `position`, after what the prompt
        and the cache hold; `seen` tells which of the cache's first places count, bool
        [1 or B, length].
        """
        q, k, v = self._heads(x, token_values, position)
        place = position if prompt is None else position - prompt[0].shape[2]
        place = place % cache[0].shape[2]
        keys, values = _put(cache[0], k, place), _put(cache[1], v, place)
        here, seen = slice(seen.shape[1]), seen[:, None, None]
        y = ops.decode_attention(q, keys[:, :, here], values[:, :, here], seen, prompt)
        return self._merge(y), (keys, values)


def _put(cache: mx.array, x: mx.array, place: mx.array) -> mx.array:
    """The cache[B, H, length, D] with x[B, H, 1, D] at one place, [1], or each row's own, [B]."""
    if place.size == 1:
        return mx.slice_update(cache, x, place, axes=(2,))
    cache = mx.array(cache)  # or it would change the caller's
    cache[mx.arange(len(x)), :, place] = x[:, :, 0]
    return cache


def rotated(x: mx.array, position: mx.array | int) -> mx.array:
    """Queries or keys[B, H, T, D], from `position` on, each pair of numbers turned by an angle that
    grows with the place (RoPE, Su et al., 2021); a number's pair is in the other half of its head.
    """
    D = x.shape[-1]
    if isinstance(position, mx.array) and position.size == 1:
        position = position.reshape(())  # of [1], GPU kernels read as many as there are sequences
    return mx.fast.rope(x, D, traditional=False, base=ROPE_BASE, scale=1.0, offset=position)


class MLP(nn.Module):
    """Two linear layers around a GELU, four times as wide inside; or around a squared ReLU (So et
    al., 2021); or gated (SwiGLU, Shazeer, 2020), with about as many parameters.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        inside = mlp_width(config)
        gated = config.mlp == "swiglu"
        self.c_fc = Linear(config.n_embd, inside * (1 + gated), bias=config.bias)
        self.c_proj = Linear(inside, config.n_embd, bias=config.bias)

    def __call__(self, x: mx.array, *, gradient: bool = True) -> mx.array:
        """[B, T, C] -> [B, T, C]; without a gradient in less time."""
        x = self.c_fc(x)
        if self.kind == "gelu":
            x = ops.gelu(x, gradient=gradient)
        elif self.kind == "relu2":
            x = mx.square(mx.where(x > 0, x, 0))
        else:
            gate, x = mx.split(x, 2, axis=-1)
            x = ops.silu(gate) * x
        return self.c_proj(x)


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def __call__(
        self, x: mx.array, token_values: mx.array | None = None, key: Key | None = None
    ) -> mx.array:
        keys = split(key, 2) if key is not None else (None, None)
        x = x + dropout(self.attn(self.ln_1(x), token_values), self.dropout, keys[0])
        return x + dropout(self.mlp(self.ln_2(x)), self.dropout, keys[1])

    def prefill(
        self, x: mx.array, token_values: mx.array | None, inside: Inside | None = None
    ) -> tuple[mx.array, LayerCache]:
        """As `__call__`, without dropout, and what attention leaves for later tokens."""
        y, kept = self.attn.prefill(self.ln_1(x), token_values, inside)
        x = x + y
        return x + self.mlp(self.ln_2(x), gradient=False), kept

    def decode(
        self,
        x: mx.array,
        token_values: mx.array | None,
        cache: LayerCache,
        position: mx.array,
        seen: mx.array,
        prompt: LayerCache | None,
    ) -> tuple[mx.array, LayerCache]:
        """As `prefill`, of one token each, after what the prompt and the cache hold."""
        y, kept = self.attn.decode(self.ln_1(x), token_values, cache, position, seen, prompt)
        x = x + y
        return x + self.mlp(self.ln_2(x), gradient=False), kept


class GPT(nn.Module):
    """Token ids -> logits.

    Args:
        config: its shape; `vocab_size` must be given.
        seed: the initial weights are a pure function of it.
        gradient_checkpointing: keep only each block's input for the backward pass.

    Ids must be below `vocab_size` and sequences no longer than `block_size`: the device checks
    neither. With `tied` the output layer is the token embedding itself (`wte`), not a copy that
    would diverge.
    """

    def __init__(
        self, config: ModelConfig, seed: int = 0, *, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = [Block(config) for _ in range(config.n_layer)]
        if config.value_embeddings:
            self.wve = [Embedding(config.vocab_size, config.n_embd) for _ in self.h]
        rms = config.norm == "rms"
        self.ln_f = RMSNorm(config.n_embd, gain=True) if rms else make_norm(config)
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self._checkpointing = gradient_checkpointing
        self.update(initial_parameters(self, seed))

    def __call__(self, ids: mx.array, key: Key | None = None) -> mx.array:
        """Logits[B, T, V] of ids[B, T]; dropout with `key`, none without."""
        count = len(self.h) + 1
        keys = split(key, count) if key is not None else [None] * count
        x = self._embedded(ids)
        if self.config.position == "learned":
            x = x + self.wpe.weight[: ids.shape[1]]
        x = dropout(x, self.config.dropout, keys[0])
        for n, (block, block_key) in enumerate(zip(self.h, keys[1:], strict=True)):
            # The key goes in from outside, so that the second forward pass has the same mask.
            run = nn.utils.checkpoint(block) if self._checkpointing else block
            x = run(x, self._token_values(ids, n), block_key)
        return self._logits(self.ln_f(x))

    def _embedded(self, ids: mx.array) -> mx.array:  # [B, T] -> [B, T, C]
        x = self.wte(ids)
        return ops.rms_norm(x) if self.config.embedding_norm else x

    def _token_values(self, ids: mx.array, n: int) -> mx.array | None:
        """[B, T, C] to be added to block n's values: value embeddings (modded-nanogpt, 2024)."""
        return self.wve[n](ids) if self.config.value_embeddings else None

    def _logits(self, x: mx.array) -> mx.array:
        return self.by_embedding(x) if self.config.tied else self.lm_head(x)

    def by_embedding(self, x: mx.array) -> mx.array:
        """x[..., C] times each token's embedding: [..., V]."""
        if isinstance(self.wte, nn.QuantizedEmbedding):
            return self.wte.as_linear(x)
        return ops.linear(x, self.wte.weight)

    def lens(self, x: mx.array) -> mx.array:
        """Logits[..., V] of a place of the residual stream[..., C]: after the last block the
        model's own; after an earlier one what it would say there already (the logit lens,
        nostalgebraist, 2020).
        """
        return self._logits(self.ln_f(x))

    def prefill(
        self, ids: mx.array, last: mx.array, inside: Inside | None = None
    ) -> tuple[mx.array, Cache]:
        """Read prompts in.

        Args:
            ids: [B, T]; tokens after `last` are padding.
            last: int32 [B], the index of each sequence's last real token; or [1], of all.
            inside: is filled with what is seen on the way.

        Returns:
            logits[B, V] of what follows it, and a cache of T tokens
        """
        x = self._embedded(ids)
        if self.config.position == "learned":
            x = x + self.wpe.weight[: ids.shape[1]]
        stream, cache = [x], []
        for n, block in enumerate(self.h):
            x, kept = block.prefill(x, self._token_values(ids, n), inside)
            stream.append(x)
            cache.append(kept)
        if inside is not None:
            inside.residual = stream
        last = mx.broadcast_to(last, (len(ids),))[:, None, None]
        return self.lens(mx.take_along_axis(x, last, axis=1)[:, 0]), cache

    def decode(
        self,
        ids: mx.array,
        cache: Cache,
        position: mx.array,
        length: int | None = None,
        prompt: Cache | None = None,
    ) -> tuple[mx.array, Cache]:
        """Read one token more of each sequence.

        Args:
            ids: [B].
            cache: of `prefill`, or of this, with room: see `with_room`. A token is put at its
                position, whatever is there; beyond the cache's length in the place of the oldest,
                with rotary positions alone: see `slides`.
            position: int32 [B], how many tokens were before each of these; or [1], before all.
            length: of the cache as far as it is looked at; default: all of it.
            prompt: of the tokens that all sequences begin with, of a batch of one; the cache
                then begins behind them: see `parted`. Such a cache does not slide.

        Returns:
            logits[B, V], and the cache with these tokens
        """
        ids = ids[:, None]
        x = self._embedded(ids)  # [B, 1, C]
        if self.config.position == "learned":
            x = x + self.wpe(position)[:, None]
        last = position - prompt[0][0].shape[2] if prompt else position
        seen = mx.arange(length or cache[0][0].shape[2]) <= last[:, None]
        prompts: Sequence[LayerCache | None] = prompt or [None] * len(self.h)
        longer = []
        for n, (block, layer, begun) in enumerate(zip(self.h, cache, prompts, strict=True)):
            x, kept = block.decode(x, self._token_values(ids, n), layer, position, seen, begun)
            longer.append(kept)
        return self._logits(self.ln_f(x[:, 0])), longer

    @property
    def slides(self) -> bool:
        """Whether a full cache can go on, without its oldest token: with rotary positions only the
        distance of two tokens counts. Each layer then sees the last `block_size` tokens of the one
        below it, which saw as many before each of these; who reads the last `block_size` tokens
        afresh knows nothing from before them.
        """
        return self.config.position == "rope"


def with_room(cache: Cache, length: int) -> Cache:
    """The cache with room for `length` tokens."""
    more = [(0, 0), (0, 0), (0, length - cache[0][0].shape[2]), (0, 0)]
    return [(mx.pad(keys, more), mx.pad(values, more)) for keys, values in cache]


def parted(cache: Cache, length: int) -> tuple[Cache, Cache]:
    """The cache of the first `length` tokens, and of those behind them."""
    first, rest = slice(length), slice(length, None)
    return (
        [(mx.contiguous(k[:, :, first]), mx.contiguous(v[:, :, first])) for k, v in cache],
        [(k[:, :, rest], v[:, :, rest]) for k, v in cache],
    )


def initial_parameters(model: GPT, seed: int) -> dict:
    """GPT-2's initial weights: N(0, 0.02), residual projections scaled by 1/√(2·n_layer), biases
    0, layer norms 1. They stay small, so that every logit is near 0 and the first loss near ln V.
    """
    parameters = flat(model.parameters())
    keys = mx.random.split(mx.random.key(derive(seed, "init")), len(parameters))
    residual = 1 / math.sqrt(2 * model.config.n_layer)
    values = {}
    for (name, old), key in zip(parameters.items(), keys, strict=True):
        if old.ndim >= 2:
            std = INIT_STD * (residual if name.endswith("c_proj.weight") else 1)
            new = std * mx.random.normal(old.shape, key=key)
        else:
            new = mx.zeros(old.shape) if name.endswith("bias") else mx.ones(old.shape)
        values[name] = new
    return tree_unflatten(values)


def flat(tree: Any) -> dict[str, mx.array]:
    """A tree's arrays by their dotted names, as `h.0.attn.c_attn.weight`."""
    return cast(dict[str, mx.array], tree_flatten(tree, destination={}))


def load_parameters(model: GPT, parameters: dict[str, mx.array]) -> None:
    """Put saved parameters, by their dotted names, in place of the model's own.

    Raises:
        UserError: if names, shapes or types are not this model's.
    """
    must_be_like(parameters, flat(model.parameters()))
    model.update(tree_unflatten(parameters))


def must_be_like(arrays: dict[str, mx.array], own: dict[str, mx.array]) -> None:
    """Refuse saved arrays that are not named, shaped and typed as a model's own."""

    def looks(arrays: dict[str, mx.array]) -> dict[str, Any]:
        return {name: (value.shape, value.dtype) for name, value in arrays.items()}

    if looks(arrays) != looks(own):
        raise UserError(
            "the weights are those of a model of another shape",
            "restore the run's own checkpoint; config.toml and checkpoints belong together.",
        )
