"""PyTorch, eager and compiled: the same GPT, trained as in nanoGPT."""

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
    compiler_version,
    learning_rates,
    make_random_batch,
    measure_loss_curve,
    time_training,
)


class Block(nn.Module):
    """Transformer block: attention and MLP, each with a residual connection."""

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
    """GPT-2 (Radford et al., 2019) from PyTorch's fast built-in modules, named as in mlxgpt's GPT.

    Args:
        shape: fields of a ModelConfig.
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


def torch_device() -> str:
    """Device for PyTorch: the GPU if there is one, as for MLX."""
    if os.environ.get("MLXGPT_DEVICE") == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def make_model(task: Task) -> TorchGPT:
    """The model with the weights in the task's folder."""
    model, weights = TorchGPT(task.shape), np.load(Path(task.folder) / "weights.npz")
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model.to(torch_device())


def autocast_context(task: Task) -> AbstractContextManager[object]:
    """Context in which PyTorch computes in the config's dtype."""
    is_bfloat16 = task.config["train"]["dtype"] == "bfloat16"
    return torch.autocast(torch_device(), torch.bfloat16) if is_bfloat16 else nullcontext()


COMPILED_NAME = "PyTorch, compiled"  # the framework's name in runner.py


def make_train_step(model: TorchGPT, task: Task) -> Callable[[torch.Tensor], float]:
    """Training step on ids [B, T + 1], as in nanoGPT, with the fused AdamW."""
    optim = Task(**task.config["optim"])
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() >= 2]},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    rates = iter(learning_rates(task))
    forward = torch.compile(model) if task.framework == COMPILED_NAME else model

    def step(ids: torch.Tensor) -> float:
        learning_rate = next(rates, optim.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        with autocast_context(task):
            logits = forward(ids[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if optim.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        return float(loss)

    return step


def to_tensor(ids: np.ndarray) -> torch.Tensor:
    """Convert ids to a tensor on PyTorch's device."""
    return torch.tensor(ids).long().to(torch_device())


def training(task: Task) -> Result:
    """Training steps of the same model, eager or compiled."""
    step, ids = make_train_step(make_model(task), task), to_tensor(make_random_batch(task))
    return time_training(task, lambda: step(ids)) | {**torch_metadata()}


def learning(task: Task) -> Result:
    """Loss curve of PyTorch's training step on the given batches and windows."""
    model = make_model(task)
    step = make_train_step(model, task)

    def evaluate(windows: np.ndarray) -> float:
        ids = to_tensor(windows)
        with torch.no_grad():
            logits = model(ids[:, :-1])
            return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    curve = measure_loss_curve(task, lambda batch: step(to_tensor(batch)), evaluate)
    return curve | {**torch_metadata()}


def torch_metadata(*packages: str) -> Result:
    """Versions and settings of PyTorch and packages on it; on a GPU, also peak memory in bytes."""
    blas_info = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    environment = {
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", *packages)),
        "device": torch_device(),
        "threads": str(torch.get_num_threads()),
        "BLAS": blas_info[1] if blas_info else "PyTorch's own",
        "compiler": compiler_version(),
    }
    if torch_device() == "cuda":
        return {"made_with": environment, "peak_memory": torch.cuda.max_memory_allocated()}
    if torch_device() == "mps":
        return {"made_with": environment, "peak_memory": torch.mps.driver_allocated_memory()}
    return {"made_with": environment}
