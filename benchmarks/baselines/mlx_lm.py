"""mlx-lm on the same BLAS as mlxgpt: its trainer, and its two ways to generate."""

from __future__ import annotations

import importlib
import math
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.optimizers import AdamW
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.utils import load_model

from baselines.mlxgpt_baseline import with_mlx
from baselines.tasks import WARMUP, Result, Task, prompt_of, random_batch, timed_texts
from mlxgpt.backend import execution


class Texts(list[np.ndarray]):
    """Ids as mlx-lm's datasets hold them."""

    def process(self, ids: np.ndarray) -> tuple[list[int], int]:
        return ids.tolist(), 0


class Clock(TrainingCallback):
    """Tokens a second of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_loss_report(self, train_info: dict[str, float]) -> None:
        self.rates.append(train_info["tokens_per_second"])


def training(task: Task) -> Result:
    """mlx-lm's trainer on all weights: `mlx_lm.lora --fine-tune-type full`."""
    model, o, batch = _model(task), task.config["optim"], random_batch(task)

    def rates(steps: int) -> list[float]:
        arguments = TrainingArgs(
            batch_size=len(batch),
            iters=steps,
            steps_per_report=1,
            steps_per_save=steps + 1,
            max_seq_length=batch.shape[1],
            adapter_file=f"{task.folder}/adapters.safetensors",
        )
        optimizer = AdamW(o["learning_rate"], [o["beta1"], o["beta2"]], o["eps"], o["weight_decay"])
        clock = Clock()
        train(
            model, optimizer, CacheDataset(Texts(batch)), None, arguments, training_callback=clock
        )
        return clock.rates[WARMUP:]

    measured = rates(WARMUP + 2)
    steps = math.ceil(task.seconds * measured[-1] / batch[:, 1:].size)
    if steps > 2:
        measured = rates(WARMUP + steps)
    return {"tokens_per_second": statistics.harmonic_mean(measured), **with_mlx("mlx-lm")}


def generate(task: Task) -> Result:
    """mlx-lm's `generate_step` for one text, its `BatchGenerator` for several; greedy."""
    model = _model(task)
    generation = importlib.import_module("mlx_lm.generate")  # mlx_lm.generate is a function
    prompt = prompt_of(task)

    def run() -> list[float]:
        if task.texts == 1:
            drawn = generation.generate_step(mx.array(prompt), model, max_tokens=task.new_tokens)
            return [time.perf_counter() for _ in drawn]
        batch = generation.BatchGenerator(
            model,
            max_tokens=task.new_tokens,
            completion_batch_size=task.texts,
            prefill_batch_size=task.texts,
        )
        batch.insert([prompt.tolist()] * task.texts)
        times = []
        while batch.next_generated():
            times.append(time.perf_counter())
        batch.close()
        return times

    return timed_texts(task, run) | {**with_mlx("mlx-lm")}


def _model(task: Task) -> Any:
    execution.compile_failure()  # kernels go where mlxgpt's are
    model, _ = load_model(Path(task.folder))
    mx.eval(model.parameters())
    return model
