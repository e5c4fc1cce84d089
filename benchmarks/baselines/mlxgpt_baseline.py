"""mlxgpt, measured like the other libraries."""

from __future__ import annotations

import math
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from baselines.tasks import (
    WARMUP_STEPS,
    Result,
    Task,
    compiler_version,
    learning_rates,
    make_prompt,
    measure_loss_curve,
    time_generation,
)
from mlxgpt.backend import device, execution
from mlxgpt.config import DataConfig, ModelConfig, SamplingParams, config_from_tree
from mlxgpt.data.prepare import find_or_prepare
from mlxgpt.data.prepare_job import PrepareRequest
from mlxgpt.data.token_array import Batch, TokenArray, dtype_for
from mlxgpt.inference.decode import BatchDecoder, generate_step
from mlxgpt.inference.engine import CompiledModel
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import make_eval_step
from mlxgpt.training.step import TrainStep, take_steps


def training(task: Task) -> Result:
    """Training steps on random ids."""
    config = config_from_tree(task.config)
    vocab_size, steps_done = config.model.vocab_size, 0
    ids = np.random.default_rng(0).integers(vocab_size, size=64 * config.tokens_per_step)
    tokens = TokenArray(ids.astype(dtype_for(vocab_size)), vocab_size)
    train_step = TrainStep(_make_model(task), config)

    def time_steps(steps: int) -> float:
        nonlocal steps_done
        first_step, steps_done = steps_done, steps_done + steps
        start = time.perf_counter()
        take_steps(train_step, tokens, config, steps, first_step)
        return time.perf_counter() - start

    time_steps(WARMUP_STEPS)
    steps = max(2, math.ceil(task.seconds / time_steps(1)))
    speed = steps * config.tokens_per_step / time_steps(steps)
    return {"tokens_per_second": speed, **mlx_metadata("mlxgpt")}


def generate(task: Task) -> Result:
    """Greedy decoding."""
    model = CompiledModel(_make_model(task), task.shape["vocab_size"])
    sampling = SamplingParams(max_tokens=task.new_tokens, temperature=0.0, seed=0)
    prompts = [(make_prompt(task), n) for n in range(task.texts)]

    def run() -> list[float]:
        decoder = BatchDecoder(model, prompts, sampling)
        return [time.perf_counter() for _ in generate_step(decoder)]

    return time_generation(task, run) | {**mlx_metadata("mlxgpt")}


def learning(task: Task) -> Result:
    """Loss curve of mlxgpt's training step on the given batches and windows."""
    train_step = TrainStep(_make_model(task), config_from_tree(task.config))
    rates = iter(learning_rates(task))

    def step(batch: np.ndarray) -> None:
        ids = mx.array(batch[None])
        learning_rate, key = mx.array(next(rates)), mx.random.key(0)
        loss, _ = train_step(Batch(ids[..., :-1], ids[..., 1:]), learning_rate, key)
        mx.eval(loss, train_step.state)

    model = train_step.model
    eval_step = make_eval_step(model, mx.float32)

    def evaluate(windows: np.ndarray) -> float:
        ids = mx.array(windows)
        shape = windows.shape[0], windows.shape[1] - 1
        nats = eval_step(model.parameters(), ids[:, :-1], ids[:, 1:], mx.ones(shape))
        return float(nats) / (shape[0] * shape[1])

    return measure_loss_curve(task, step, evaluate) | {**mlx_metadata("mlxgpt")}


def preparation(task: Task) -> Result:
    """Megabytes per second from a text file to token arrays, including BPE training."""
    data_config = DataConfig(source=(task.text,), tokenizer="bpe")
    with tempfile.TemporaryDirectory() as folder:  # empty: no prepared dataset
        start = time.perf_counter()
        dataset = find_or_prepare(PrepareRequest(data_config, task.vocab_size), Path(folder))
        seconds = time.perf_counter() - start
    size = dataset.meta.train.bytes + dataset.meta.val.bytes
    return {"megabytes_per_second": size / 1e6 / seconds, **mlx_metadata("mlxgpt")}


def _make_model(task: Task) -> GPT:
    model = GPT(
        ModelConfig(**task.shape)
    )  # the same weights as in the task's folder: see runner.py
    mx.eval(model.parameters())
    return model


def mlx_metadata(package: str) -> Result:
    """Versions and settings of a package on MLX, and peak memory in bytes."""
    environment = {
        "versions": f"{package} {version(package)}, mlx {version('mlx')}",
        "device": device.device_type(),
        "threads": str(execution.blas_thread_count() or "MLX's own"),
        "BLAS": execution.blas_status(),
        "compiler": compiler_version(),
    }
    return {"made_with": environment, "peak_memory": device.peak_memory_bytes()}
