"""PyTorch, eager and compiled: the same GPT, trained as nanoGPT does."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from baselines.tasks import (
    Result,
    Task,
    compiler,
    learning_rates,
    loss_curve,
    random_batch,
    timed_steps,
)

COMPILED = "PyTorch, compiled"


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, C: int, H: int, bias: bool) -> None:
        super().__init__()
        self.n_head = H
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(C, 3 * C, bias), "c_proj": nn.Linear(C, C, bias)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(C, 4 * C, bias), "c_proj": nn.Linear(4 * C, C, bias)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, C] -> [B, T, C]
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, T, C))
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](hidden)


class TorchGPT(nn.Module):
    """GPT-2 (Radford et al., 2019) of PyTorch's own fast parts, named as in mlxgpt's GPT.

    Args:
        shape: a ModelConfig's fields.
    """

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        C, bias = shape["n_embd"], shape["bias"]
        self.wte = nn.Embedding(shape["vocab_size"], C)
        self.wpe = nn.Embedding(shape["block_size"], C)
        self.h = nn.ModuleList(Block(C, shape["n_head"], bias) for _ in range(shape["n_layer"]))
        self.ln_f = nn.LayerNorm(C, bias=bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [B, T] -> logits [B, T, V]
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


def device() -> str:
    """The device that PyTorch uses here: the GPU if there is one, as MLX does."""
    if os.environ.get("MLXGPT_DEVICE") == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def make_model(task: Task) -> TorchGPT:
    """The model with the weights in the task's folder."""
    model, weights = TorchGPT(task.shape), np.load(Path(task.folder) / "weights.npz")
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model.to(device())


def autocast_of(task: Task) -> AbstractContextManager[object]:
    """Context in which PyTorch computes in the dtype of the config."""
    half = task.config["train"]["dtype"] == "bfloat16"
    return torch.autocast(device(), torch.bfloat16) if half else nullcontext()


def make_step(model: TorchGPT, task: Task) -> Callable[[torch.Tensor], float]:
    """A training step like nanoGPT's, on ids [B, T + 1], with the fused optimizer."""
    o = Task(**task.config["optim"])
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() >= 2]},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=o.learning_rate,
        betas=(o.beta1, o.beta2),
        eps=o.eps,
        weight_decay=o.weight_decay,
        fused=True,
    )
    rates = iter(learning_rates(task))
    forward = torch.compile(model) if task.framework == COMPILED else model

    def step(ids: torch.Tensor) -> float:
        rate = next(rates, o.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast_of(task):
            logits = forward(ids[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if o.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        return float(loss)

    return step


def ids_of(array: np.ndarray) -> torch.Tensor:
    """Ids on PyTorch's device."""
    return torch.tensor(array).long().to(device())


def training(task: Task) -> Result:
    """Training steps of the same model, eager or compiled."""
    step, ids = make_step(make_model(task), task), ids_of(random_batch(task))
    return timed_steps(task, lambda: step(ids)) | {**with_torch()}


def learning(task: Task) -> Result:
    """A loss curve of PyTorch's training step, over the given batches and windows."""
    model = make_model(task)
    step = make_step(model, task)

    def loss(windows: np.ndarray) -> float:
        ids = ids_of(windows)
        with torch.no_grad():
            logits = model(ids[:, :-1])
            return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    curve = loss_curve(task, lambda batch: step(ids_of(batch)), loss)
    return curve | {**with_torch()}


def with_torch(*packages: str) -> Result:
    """What PyTorch and packages on it ran with; on a GPU, also the peak memory of its arrays."""
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    made_with = {
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", *packages)),
        "device": device(),
        "threads": str(torch.get_num_threads()),
        "BLAS": blas[1] if blas else "PyTorch's own",
        "compiler": compiler(),
    }
    if device() == "cuda":
        return {"made_with": made_with, "peak_memory": torch.cuda.max_memory_allocated()}
    if device() == "mps":
        return {"made_with": made_with, "peak_memory": torch.mps.driver_allocated_memory()}
    return {"made_with": made_with}
