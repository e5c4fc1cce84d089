"""mlxgpt itself, measured like the others."""

from __future__ import annotations

import math
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from baselines.tasks import (
    WARMUP,
    Result,
    Task,
    compiler,
    learning_rates,
    loss_curve,
    prompt_of,
    timed_texts,
)
from mlxgpt.backend import device, execution
from mlxgpt.config import DataConfig, ModelConfig, SamplingParams, config_from_tree
from mlxgpt.data.prepare import PrepareRequest, find_or_prepare
from mlxgpt.data.token_array import TokenArray, dtype_for
from mlxgpt.inference.decode import BatchDecoder, generate_step
from mlxgpt.inference.engine import CompiledModel
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import make_eval_step
from mlxgpt.training.step import TrainStep, take_steps


def training(task: Task) -> Result:
    """Steps of the trainer, over random ids."""
    config = config_from_tree(task.config)
    vocabulary, done = config.model.vocab_size, 0
    ids = np.random.default_rng(0).integers(vocabulary, size=64 * config.tokens_per_step)
    tokens = TokenArray(ids.astype(dtype_for(vocabulary)), vocabulary)
    step = TrainStep(_model(task), config)

    def seconds_of(steps: int) -> float:
        nonlocal done
        start, done = done, done + steps
        began = time.perf_counter()
        take_steps(step, tokens, config, steps, start)
        return time.perf_counter() - began

    seconds_of(WARMUP)
    steps = max(2, math.ceil(task.seconds / seconds_of(1)))
    rate = steps * config.tokens_per_step / seconds_of(steps)
    return {"tokens_per_second": rate, **with_mlx("mlxgpt")}


def generate(task: Task) -> Result:
    """Greedy decoding."""
    compiled = CompiledModel(_model(task), task.shape["vocab_size"])
    sampling = SamplingParams(max_tokens=task.new_tokens, temperature=0.0, seed=0)
    texts = [(prompt_of(task), n) for n in range(task.texts)]

    def run() -> list[float]:
        batch = BatchDecoder(compiled, texts, sampling)
        return [time.perf_counter() for _ in generate_step(batch)]

    return timed_texts(task, run) | {**with_mlx("mlxgpt")}


def learning(task: Task) -> Result:
    """A loss curve of the training step, over the given batches and windows."""
    step = TrainStep(_model(task), config_from_tree(task.config))
    rates = iter(learning_rates(task))

    def take(batch: np.ndarray) -> None:
        ids = mx.array(batch[None])
        rate, key = mx.array(next(rates)), mx.random.key(0)
        loss, _ = step(ids[..., :-1], ids[..., 1:], rate, key)
        mx.eval(loss, step.state)

    evaluate = make_eval_step(step.model, mx.float32)

    def loss(windows: np.ndarray) -> float:
        ids = mx.array(windows)
        shape = windows.shape[0], windows.shape[1] - 1
        nats = evaluate(step.model.parameters(), ids[:, :-1], ids[:, 1:], mx.ones(shape))
        return float(nats) / (shape[0] * shape[1])

    return loss_curve(task, take, loss) | {**with_mlx("mlxgpt")}


def preparation(task: Task) -> Result:
    """Megabytes per second from a text file to token arrays, training of the BPE included."""
    data = DataConfig(source=(task.text,), tokenizer="bpe")
    with tempfile.TemporaryDirectory() as folder:  # where nothing is prepared
        began = time.perf_counter()
        dataset = find_or_prepare(PrepareRequest(data, task.vocab_size), Path(folder))
        seconds = time.perf_counter() - began
    size = dataset.meta.train.bytes + dataset.meta.val.bytes
    return {"megabytes_per_second": size / 1e6 / seconds, **with_mlx("mlxgpt")}


def _model(task: Task) -> GPT:
    model = GPT(ModelConfig(**task.shape))  # the weights in the folder are these: runner.py
    mx.eval(model.parameters())
    return model


def with_mlx(package: str) -> Result:
    """What a package on MLX ran with, and its peak memory: on a GPU that of MLX's arrays."""
    made_with = {
        "versions": f"{package} {version(package)}, mlx {version('mlx')}",
        "device": device.device_type(),
        "threads": str(execution.blas_thread_count() or "MLX's own"),
        "BLAS": execution.blas_status(),
        "compiler": compiler(),
    }
    return {"made_with": made_with, "peak_memory": device.peak_memory_bytes()}
