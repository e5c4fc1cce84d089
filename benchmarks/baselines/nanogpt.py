"""nanoGPT: model and optimizer from a checkout's model.py."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

import numpy as np
import torch

from baselines.pytorch import autocast_context, to_tensor, torch_device, torch_metadata
from baselines.tasks import (
    Result,
    Task,
    make_prompt,
    make_random_batch,
    time_generation,
    time_training,
)


def training(task: Task) -> Result:
    """Training steps with nanoGPT's model and optimizer, eager."""
    model, optim = _make_model(task), task.config["optim"]
    betas = optim["beta1"], optim["beta2"]
    optimizer = model.configure_optimizers(
        optim["weight_decay"], optim["learning_rate"], betas, torch_device()
    )
    ids = to_tensor(make_random_batch(task))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> float:
        with autocast_context(task):
            _, loss = model(inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if optim["grad_clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim["grad_clip"])
        optimizer.step()
        return float(loss)

    return time_training(task, step) | {**torch_metadata()}


def generate(task: Task) -> Result:
    """Generation with nanoGPT's model, which has no KV cache."""
    model = _make_model(task).eval()
    ids = to_tensor(np.tile(make_prompt(task), (task.texts, 1)))

    def run() -> list[float]:
        model.generate(ids, 1).cpu()  # waits for the result
        first_time = time.perf_counter()
        model.generate(ids, task.new_tokens - 1).cpu()
        return [first_time, time.perf_counter()]

    return time_generation(task, run) | {**torch_metadata()}


def _make_model(task: Task) -> Any:
    sys.path.append(task.nanogpt)
    nanogpt = importlib.import_module("model")
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
    shape = {name: task.shape[name] for name in names}
    return nanogpt.GPT(nanogpt.GPTConfig(dropout=0.0, **shape)).to(torch_device())
