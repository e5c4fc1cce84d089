"""The modern recipe in PyTorch: a second implementation, written from the papers and the config, of
the model and optimizer that `configs/tier1-modern.toml` and `configs/tier2-modern.toml` select.

`parity.py` compares it with mlxgpt. Parameters have mlxgpt's names. Shapes: B batch size, T tokens,
C n_embd, H heads, D = C / H, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlxgpt.config import Config
from mlxgpt.data.token_array import Batch

# What is implemented; all other settings are read from the config.
SETTINGS = {
    "dropout": 0.0,
    "bias": False,
    "position": "rope",
    "norm": "rms",
    "qk_norm": True,
    "mlp": "swiglu",
    "tied": False,
    "embedding_norm": True,
    "value_embeddings": False,
    "smear": False,
    "token_shift": False,
    "optimizer": "muon",
    "schedule": "wsd",
    "grad_clip": 0.0,
    "dtype": "float32",
}
NORM_EPS = 1e-5
ROPE_BASE = 10_000.0


def rms_norm(x: Tensor) -> Tensor:  # [..., C] -> [..., C]
    """RMSNorm without gain (Zhang & Sennrich, 2019)."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPS)


def rotate(x: Tensor) -> Tensor:  # [B, H, T, D] -> [B, H, T, D]
    """Rotary positions (Su et al., 2021): dimensions i and i + D/2 are a pair."""
    T, D = x.shape[-2:]
    frequencies = ROPE_BASE ** (-torch.arange(0, D, 2, dtype=x.dtype) / D)
    angles = torch.outer(torch.arange(T, dtype=x.dtype), frequencies)  # [T, D/2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with QK norm (Henry et al., 2020) and rotary positions."""

    def __init__(self, C: int, H: int) -> None:
        super().__init__()
        self.n_head = H
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        B, T, C = x.shape
        qkv = self.c_attn(x).split(C, dim=-1)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in qkv)
        q, k = rotate(rms_norm(q)), rotate(rms_norm(k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020); its width is the multiple of 32 that is nearest to 8/3·C."""

    def __init__(self, C: int) -> None:
        super().__init__()
        width = 32 * max(1, round(8 * C / 3 / 32))
        self.c_fc, self.c_proj = nn.Linear(C, 2 * width, False), nn.Linear(width, C, False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        gate, value = self.c_fc(x).chunk(2, dim=-1)
        return self.c_proj(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and MLP, each after a norm and with a residual connection."""

    def __init__(self, C: int, H: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(C, H), MLP(C)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        x = x + self.attn(rms_norm(x))
        return x + self.mlp(rms_norm(x))


class FinalNorm(nn.Module):
    """RMSNorm with a gain."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:  # [..., C] -> [..., C]
        return rms_norm(x) * self.weight


class ModernGPT(nn.Module):
    """Token ids [B, T] -> logits [B, T, V]; the output head is not tied to the embedding."""

    def __init__(self, V: int, C: int, H: int, n_layer: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(V, C)
        self.h = nn.ModuleList(Block(C, H) for _ in range(n_layer))
        self.ln_f = FinalNorm(C)
        self.lm_head = nn.Linear(C, V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, V]
        x = rms_norm(self.wte(ids))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def orthogonalize(x: Tensor) -> Tensor:  # [R, C] -> [R, C]
    """Five Newton-Schulz steps with Jordan's coefficients (2024): singular values near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


class NorMuon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) with row normalization (NorMuon, Li et al., 2025) and decoupled
    weight decay. A group's matrices consist of `parts` matrices, one above the other.
    """

    MOMENTUM = ROW_MOMENTUM = 0.95
    ROW_EPS = 1e-12

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                    state["rows"] = torch.zeros_like(p[:, :1])  # mean squares
                momentum = state["momentum"].lerp_(p.grad, 1 - self.MOMENTUM)
                nesterov = p.grad.lerp(momentum, self.MOMENTUM)
                parts = nesterov.chunk(group["parts"])
                aspect_ratio = max(1.0, parts[0].shape[0] / parts[0].shape[1])
                update = torch.cat([orthogonalize(part) for part in parts]) * aspect_ratio**0.5
                mean_squares = update.square().mean(dim=1, keepdim=True)
                rows = state["rows"].lerp_(mean_squares, 1 - self.ROW_MOMENTUM)
                scaled = update / (rows + self.ROW_EPS).sqrt()
                scaled *= update.norm() / scaled.norm()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * scaled)


def make_optimizers(model: ModernGPT, config: Config) -> list[torch.optim.Optimizer]:
    """NorMuon for the matrices of the blocks; AdamW for the embedding, which is not decayed, the
    output head and the final norm, which is not decayed either.
    """
    o = config.optim
    blocks = [(n, p) for n, p in model.h.named_parameters() if p.ndim == 2]
    muon_groups = [
        {"params": [p for n, p in blocks if "c_attn" in n], "parts": 3},
        {"params": [p for n, p in blocks if "c_attn" not in n], "parts": 1},
    ]
    adamw_groups = [
        {"params": model.wte.parameters(), "lr": o.embedding_learning_rate, "weight_decay": 0.0},
        {"params": model.lm_head.parameters(), "weight_decay": o.weight_decay},
        {"params": model.ln_f.parameters(), "weight_decay": 0.0},
    ]
    muon = NorMuon(muon_groups, {"lr": o.muon_learning_rate, "weight_decay": o.weight_decay})
    adamw = torch.optim.AdamW(adamw_groups, o.learning_rate, (o.beta1, o.beta2), o.eps)
    return [muon, adamw]


def rate_factor(step: int, config: Config) -> float:
    """Learning rate of a step, from 0, relative to its peak: linear warmup, then constant, then
    linear over the last `cooldown` fraction of all steps.
    """
    o = config.optim
    end = o.decay_steps or config.train.max_steps
    if step < o.warmup_steps:
        return (step + 1) / (o.warmup_steps + 1)
    start = max(o.warmup_steps, round(end * (1 - o.cooldown)))
    progress = min(1.0, (step - start) / (end - start)) if step > start else 0.0
    return 1 - progress * (1 - o.min_lr_ratio)


def twin_losses(
    config: Config,
    batches: Iterable[Batch],
    parameters: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Iterator[float]:
    """The loss of each step, before its update.

    Args:
        batches: the batch [A, B, T] of each step, of A micro-batches.
        parameters: the initial weights, by name.
    """
    m = config.model
    model = ModernGPT(m.vocab_size, m.n_embd, m.n_head, m.n_layer).to(dtype)
    model.load_state_dict(parameters)
    optimizers = make_optimizers(model, config)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, config))
        for optimizer in optimizers
    ]
    for inputs, targets in ((torch.tensor(b.inputs), torch.tensor(b.targets)) for b in batches):
        losses = []
        for ids, target_ids in zip(inputs.long(), targets.long(), strict=True):
            loss = F.cross_entropy(model(ids).flatten(0, 1), target_ids.flatten())
            (loss / len(inputs)).backward()
            losses.append(loss.item())
        for update in (*optimizers, *schedules):
            update.step()
        model.zero_grad()
        yield sum(losses) / len(losses)
