"""nanoGPT: the model and the optimizer of a checkout's model.py."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

import numpy as np
import torch

from baselines.pytorch import autocast_of, device, ids_of, with_torch
from baselines.tasks import (
    Result,
    Task,
    prompt_of,
    random_batch,
    timed_steps,
    timed_texts,
)


def training(task: Task) -> Result:
    """Training steps of nanoGPT's model and optimizer, eager."""
    model, o = _model(task), task.config["optim"]
    optimizer = model.configure_optimizers(
        o["weight_decay"], o["learning_rate"], (o["beta1"], o["beta2"]), device()
    )
    ids = ids_of(random_batch(task))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> float:
        with autocast_of(task):
            _, loss = model(inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if o["grad_clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), o["grad_clip"])
        optimizer.step()
        return float(loss)

    return timed_steps(task, step) | {**with_torch()}


def generate(task: Task) -> Result:
    """Its own `generate`, which has no cache."""
    model = _model(task).eval()
    ids = ids_of(np.tile(prompt_of(task), (task.texts, 1)))

    def run() -> list[float]:
        model.generate(ids, 1).cpu()  # waits for the result
        first = time.perf_counter()
        model.generate(ids, task.new_tokens - 1).cpu()
        return [first, time.perf_counter()]

    return timed_texts(task, run) | {**with_torch()}


def _model(task: Task) -> Any:
    sys.path.append(task.nanogpt)
    nanogpt, s = importlib.import_module("model"), task.shape
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
    shape = {name: s[name] for name in names}
    return nanogpt.GPT(nanogpt.GPTConfig(dropout=0.0, **shape)).to(device())
