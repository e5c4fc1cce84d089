"""GPT-2 (Radford et al., 2019): token ids -> logits, with or without a KV cache. The config can
select newer components: rotary positions, RMSNorm, QK norm, value embeddings, other MLPs, and
attention to the previous token's vector.

Names are GPT-2's. Shapes: B batch size, T tokens, C n_embd, H heads, D = C / H, V vocab_size.
There is no train or eval mode: dropout is applied only if a random key is passed.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxgpt.backend import ops
from mlxgpt.config import ModelConfig
from mlxgpt.model.activations import ActivationRecorder
from mlxgpt.model.dropout import dropout, split_key
from mlxgpt.model.init_weights import init_parameters
from mlxgpt.model.kv_cache import KVCache, shift_right
from mlxgpt.model.rope import apply_rope
from mlxgpt.model.stats import (
    SMEAR_CHANNELS,
    VALUE_GATE_CHANNELS,
    find_value_layers,
    mlp_width,
)


class Linear(nn.Linear):
    """Linear layer with weight [O, I] and optional bias [O]."""

    def __call__(self, x: mx.array) -> mx.array:  # [..., I] -> [..., O]
        return ops.linear(x, self.weight, self.get("bias"))


class Embedding(nn.Embedding):
    """Embedding table [V, C]."""

    def __call__(self, ids: mx.array) -> mx.array:  # [...] -> [..., C]
        return ops.embedding(self.weight, ids)

    def as_linear(self, x: mx.array) -> mx.array:
        """Product of x [..., C] and the transposed table: [..., V]."""
        return ops.linear(x, self.weight)


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al., 2016) with weight [C] and optional bias [C]."""

    def __call__(self, x: mx.array) -> mx.array:  # [..., C] -> [..., C]
        return ops.layer_norm(x, self.weight, self.get("bias"))


class RMSNorm(nn.Module):
    """RMSNorm (Zhang & Sennrich, 2019); a gain is only needed if no linear layer follows that could
    absorb it.
    """

    def __init__(self, size: int, *, gain: bool) -> None:
        super().__init__()
        if gain:
            self.weight = mx.ones(size)

    def __call__(self, x: mx.array) -> mx.array:  # [..., C] -> [..., C]
        return ops.rms_norm(x, self.get("weight"))


def make_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """The norm before attention and MLP."""
    if config.norm == "rms":
        return RMSNorm(config.n_embd, gain=False)
    return LayerNorm(config.n_embd, bias=config.bias)


def shift(x: mx.array, cache: KVCache | None) -> mx.array:
    """Vectors x [B, H, T, D] of the tokens before, [B, H, T, D]; zeros before the first token."""
    return shift_right(x) if cache is None else cache.shift(x)


class Smear(nn.Module):
    """Adds a gated share of the previous token's vector to each token's: bigrams without attention
    (modded-nanogpt, 2025). The gate depends on the first channels of the input, as in nanochat.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.channels = min(SMEAR_CHANNELS, config.n_embd)
        self.gate = Linear(self.channels, 1, bias=False)

    def __call__(self, x: mx.array, cache: KVCache | None = None) -> mx.array:
        """[B, T, C] -> [B, T, C]"""
        share = mx.sigmoid(self.gate(x[..., : self.channels]))
        return x + share * shift(x[:, None], cache)[:, 0]


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention.

    Args:
        has_value_gate: whether value embeddings are scaled by a gate per head, from 0 to 3, that
            depends on the first channels of the input (nanochat, 2026).
    """

    def __init__(self, config: ModelConfig, *, has_value_gate: bool = False) -> None:
        super().__init__()
        self.n_head = config.n_head
        if has_value_gate:
            self.value_channels = min(VALUE_GATE_CHANNELS, config.n_embd)
            self.value_gate = Linear(self.value_channels, config.n_head, bias=False)
        if config.token_shift:
            self.smear = Smear(config)
        self.rope = config.position == "rope"
        self.qk_norm = config.qk_norm
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def __call__(
        self,
        x: mx.array,
        value_embeddings: mx.array | None = None,
        cache: KVCache | None = None,
        recorder: ActivationRecorder | None = None,
    ) -> mx.array:
        """[B, T, C] -> [B, T, C]; `value_embeddings` [B, T, C] are added to the values."""
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        if "smear" in self:
            x = self.smear(x, cache)
        q, k, v = self.c_attn(x).reshape(B, T, 3, H, D).transpose(2, 0, 3, 1, 4)  # [B, H, T, D]
        if value_embeddings is not None:
            value_embeddings = value_embeddings.reshape(B, T, H, D).swapaxes(1, 2)
            if "value_gate" in self:
                gate = self.value_gate(x[..., : self.value_channels])  # [B, T, H]
                value_embeddings *= 3 * mx.sigmoid(gate).swapaxes(1, 2)[..., None]
            v = v + value_embeddings
        if self.qk_norm:
            q, k = ops.rms_norm(q), ops.rms_norm(k)
        if "smear" in self:
            # The slowly rotated half of each key is the previous token's, so that a query can find
            # what followed a token in one layer (modded-nanogpt's partial key offset, 2025).
            is_slow = mx.arange(D) % (D // 2) >= D // 4
            k = mx.where(is_slow, shift(k, cache), k)
        if self.rope:
            position = cache.position if cache is not None else None
            q, k = apply_rope(q, position), apply_rope(k, position)
        y = ops.causal_attention(q, k, v) if cache is None else cache.attend(q, k, v)
        if recorder is not None:
            y = recorder.record_attention(q, k, y)
        return self.c_proj(y.transpose(0, 2, 1, 3).reshape(B, T, C))  # [B, T, C]


class MLP(nn.Module):
    """Two linear layers around a GELU or a squared ReLU (So et al., 2021) of width 4·C, or around
    SwiGLU (Shazeer, 2020) with about as many parameters.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.mlp
        hidden_size = mlp_width(config)
        gated = config.mlp == "swiglu"
        self.c_fc = Linear(config.n_embd, hidden_size * (1 + gated), bias=config.bias)
        self.c_proj = Linear(hidden_size, config.n_embd, bias=config.bias)

    def __call__(self, x: mx.array, *, gradient: bool = True) -> mx.array:
        """[B, T, C] -> [B, T, C]; `gradient=False` is faster on a CPU."""
        x = self.c_fc(x)  # [B, T, hidden_size], twice as wide for SwiGLU
        if self.activation == "gelu":
            x = ops.gelu(x, gradient=gradient)
        elif self.activation == "relu2":
            x = mx.square(mx.where(x > 0, x, 0))
        else:
            gate, x = mx.split(x, 2, axis=-1)
            x = ops.silu(gate) * x
        return self.c_proj(x)


class Block(nn.Module):
    """Transformer block: attention and MLP, each after a norm and with a residual connection."""

    def __init__(self, config: ModelConfig, *, has_value_gate: bool = False) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, has_value_gate=has_value_gate)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def __call__(
        self,
        x: mx.array,
        value_embeddings: mx.array | None = None,
        key: mx.array | None = None,
        cache: KVCache | None = None,
        recorder: ActivationRecorder | None = None,
    ) -> mx.array:
        """[B, T, C] -> [B, T, C]; no gradient with a cache."""
        attn_key, mlp_key = split_key(key, 2)
        y = self.attn(self.ln_1(x), value_embeddings, cache, recorder)
        x = x + dropout(y, self.dropout, attn_key)
        y = self.mlp(self.ln_2(x), gradient=cache is None)
        return x + dropout(y, self.dropout, mlp_key)


class GPT(nn.Module):
    """GPT language model: token ids [B, T] -> logits [B, T, V].

    Args:
        config: the architecture; `vocab_size` must be set.
        seed: determines the initial weights.
        gradient_checkpointing: store only each block's input, and recompute the block's activations
            in the backward pass.

    Ids must be below `vocab_size` and T at most `block_size`; neither is checked. With `tied`, the
    output head is the token embedding `wte` itself.
    """

    def __init__(
        self, config: ModelConfig, seed: int = 0, *, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        if config.smear:
            self.smear = Smear(config)
        value_layers = find_value_layers(config)
        self.h = [
            Block(config, has_value_gate=config.value_gate and layer in value_layers)
            for layer in range(config.n_layer)
        ]
        if value_layers:  # modded-nanogpt, 2024
            self.wve = [Embedding(config.vocab_size, config.n_embd) for _ in value_layers]
        rms = config.norm == "rms"
        self.ln_f = RMSNorm(config.n_embd, gain=True) if rms else make_norm(config)
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self._gradient_checkpointing = gradient_checkpointing
        self.update(init_parameters(self, config, seed))

    def __call__(
        self,
        ids: mx.array,
        cache: KVCache | None = None,
        *,
        key: mx.array | None = None,
        last: mx.array | None = None,
        recorder: ActivationRecorder | None = None,
    ) -> mx.array:
        """Logits of the next token after each position.

        Args:
            ids: token ids, [B, T].
            cache: KV cache of earlier tokens; these tokens are added to it. No gradient with it.
            key: random key for dropout; default: no dropout.
            last: int32, index of each sequence's last token [B], or of all sequences [1]: only its
                logits are computed; later tokens are padding.
            recorder: records the activations.

        Returns:
            [B, T, V]; with `last` [B, V]
        """
        x = self.run_blocks(ids, cache, key=key, recorder=recorder)
        if last is not None:
            last = mx.broadcast_to(last, (ids.shape[0],))[:, None, None]
            x = mx.take_along_axis(x, last, axis=1)[:, 0]  # [B, C]
        return self.compute_logits(x)

    def run_blocks(
        self,
        ids: mx.array,
        cache: KVCache | None = None,
        *,
        key: mx.array | None = None,
        recorder: ActivationRecorder | None = None,
    ) -> mx.array:
        """Residual stream after the last block, [B, T, C]; arguments as in `__call__`."""
        T = ids.shape[1]
        embedding_key, *block_keys = split_key(key, 1 + len(self.h))
        x = self.wte(ids)  # [B, T, C]
        if self.config.embedding_norm:
            x = ops.rms_norm(x)
        if self.config.smear:
            x = self.smear(x, cache)
        if self.config.position == "learned":
            position = cache.position if cache is not None else None
            # A slice if possible, since the gradient of a lookup is summed row by row.
            x = x + (self.wpe.weight[:T] if position is None else self.wpe(position)[:, None])
        x = dropout(x, self.config.dropout, embedding_key)
        recompute = self._gradient_checkpointing and cache is None
        value_layers = find_value_layers(self.config)
        for layer, block in enumerate(self.h):
            if recorder is not None:
                recorder.record_residual(x)
            has_values = layer in value_layers
            value_embeddings = self.wve[value_layers.index(layer)](ids) if has_values else None
            # The key is an argument, so that recomputation uses the same dropout mask.
            forward = nn.utils.checkpoint(block) if recompute else block
            x = forward(x, value_embeddings, block_keys[layer], cache, recorder)  # [B, T, C]
        if recorder is not None:
            recorder.record_residual(x)
        return x

    def compute_logits(self, x: mx.array) -> mx.array:
        """Logits [..., V] of the residual stream x [..., C]. After the last block, they are the
        model's output; after an earlier block, its logit lens (nostalgebraist, 2020).
        """
        x = self.ln_f(x)
        return self.wte.as_linear(x) if self.config.tied else self.lm_head(x)

    @property
    def supports_sliding_window(self) -> bool:
        """Whether a full cache can drop its oldest token and continue. Rotary positions allow it,
        since only the distance of two tokens matters. Each layer sees the last `block_size` tokens
        of the layer below, so information from older tokens is kept, which recomputing the cache
        from the last `block_size` tokens would lose.
        """
        return self.config.position == "rope"
