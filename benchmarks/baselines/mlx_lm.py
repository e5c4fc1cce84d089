"""mlx-lm with the same BLAS as mlxgpt: its trainer and its two generators."""

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

from baselines.mlxgpt_baseline import mlx_metadata
from baselines.tasks import (
    WARMUP_STEPS,
    Result,
    Task,
    make_prompt,
    make_random_batch,
    time_generation,
)
from mlxgpt.backend import execution


class TokenDataset(list[np.ndarray]):
    """Dataset of token ids, with the interface of mlx-lm's datasets."""

    def process(self, ids: np.ndarray) -> tuple[list[int], int]:
        return ids.tolist(), 0


class SpeedRecorder(TrainingCallback):
    """Records the tokens per second of each step."""

    def __init__(self) -> None:
        self.speeds: list[float] = []

    def on_train_loss_report(self, train_info: dict[str, float]) -> None:
        self.speeds.append(train_info["tokens_per_second"])


def training(task: Task) -> Result:
    """mlx-lm's trainer on all weights: `mlx_lm.lora --fine-tune-type full`."""
    model, optim, batch = _load_model(task), task.config["optim"], make_random_batch(task)

    def measure_speeds(steps: int) -> list[float]:
        training_args = TrainingArgs(
            batch_size=len(batch),
            iters=steps,
            steps_per_report=1,
            steps_per_save=steps + 1,
            max_seq_length=batch.shape[1],
            adapter_file=f"{task.folder}/adapters.safetensors",
        )
        betas = [optim["beta1"], optim["beta2"]]
        optimizer = AdamW(optim["learning_rate"], betas, optim["eps"], optim["weight_decay"])
        dataset, recorder = CacheDataset(TokenDataset(batch)), SpeedRecorder()
        train(model, optimizer, dataset, None, training_args, training_callback=recorder)
        return recorder.speeds[WARMUP_STEPS:]

    speeds = measure_speeds(WARMUP_STEPS + 2)
    steps = math.ceil(task.seconds * speeds[-1] / batch[:, 1:].size)
    if steps > 2:
        speeds = measure_speeds(WARMUP_STEPS + steps)
    return {"tokens_per_second": statistics.harmonic_mean(speeds), **mlx_metadata("mlx-lm")}


def generate(task: Task) -> Result:
    """Greedy generation with `generate_step` for one text, `BatchGenerator` for several."""
    model = _load_model(task)
    generation = importlib.import_module("mlx_lm.generate")  # mlx_lm.generate is a function
    prompt = make_prompt(task)

    def run() -> list[float]:
        if task.texts == 1:
            tokens = generation.generate_step(mx.array(prompt), model, max_tokens=task.new_tokens)
            return [time.perf_counter() for _ in tokens]
        generator = generation.BatchGenerator(
            model,
            max_tokens=task.new_tokens,
            completion_batch_size=task.texts,
            prefill_batch_size=task.texts,
        )
        generator.insert([prompt.tolist()] * task.texts)
        times = []
        while generator.next_generated():
            times.append(time.perf_counter())
        generator.close()
        return times

    return time_generation(task, run) | {**mlx_metadata("mlx-lm")}


def _load_model(task: Task) -> Any:
    execution.compile_failure()  # sets up the compiler and kernel folder as for mlxgpt
    model, _ = load_model(Path(task.folder))
    mx.eval(model.parameters())
    return model
