"""mlxgpt itself, as its rivals are measured."""

from __future__ import annotations

import math
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxgpt.backend.cpu import blas
from mlxgpt.config import DataConfig, ModelConfig, Sampling, from_tree, override
from mlxgpt.corpus.prepare import find_or_prepare
from mlxgpt.corpus.tokens import Tokens, dtype_for
from mlxgpt.inference.decode import BatchDecoder, generate_step
from mlxgpt.inference.engine import CompiledModel
from mlxgpt.machine import device
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import make_eval_step
from mlxgpt.rivals.timing import (
    WARMUP,
    Result,
    Task,
    compiler,
    learned,
    prompt_of,
    rates_of,
    timed_texts,
)
from mlxgpt.training.step import TrainStep
from mlxgpt.training.trainer import train


def training(task: Task) -> Result:
    """Our trainer's steps, over random ids."""
    config = from_tree(task.config)
    vocabulary, done = config.model.vocab_size, 0
    ids = np.random.default_rng(0).integers(vocabulary, size=64 * config.tokens_per_step)
    tokens = Tokens(ids.astype(dtype_for(vocabulary)), vocabulary)
    step = TrainStep(_model(task), config)

    def seconds_of(steps: int) -> float:
        nonlocal done
        start, done = done, done + steps
        began = time.perf_counter()
        train(step, tokens, override(config, {"max_steps": done}), start=start)
        mx.eval(step.state)
        return time.perf_counter() - began

    seconds_of(WARMUP)
    steps = max(2, math.ceil(task.seconds / seconds_of(1)))
    rate = steps * config.tokens_per_step / seconds_of(steps)
    return {"tokens_per_second": rate, **with_mlx("mlxgpt")}


def generate(task: Task) -> Result:
    """Our own decoding."""
    compiled = CompiledModel(_model(task), task.shape["vocab_size"])
    sampling = Sampling(max_tokens=task.new_tokens, temperature=0.0, seed=0)
    texts = [(prompt_of(task), n) for n in range(task.texts)]

    def run() -> list[float]:
        batch = BatchDecoder(compiled, texts, sampling)
        return [time.perf_counter() for _ in generate_step(batch)]

    return timed_texts(task, run) | {**with_mlx("mlxgpt")}


def learning(task: Task) -> Result:
    """Our step on given batches, and our loss on given windows."""
    step = TrainStep(_model(task), from_tree(task.config))
    rates = iter(rates_of(task))

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

    return learned(task, take, loss) | {**with_mlx("mlxgpt")}


def preparation(task: Task) -> Result:
    """Megabytes a second, from a file of texts to token arrays, the BPE's training included."""
    data = DataConfig(source=(task.text,), tokenizer="bpe")
    with tempfile.TemporaryDirectory() as folder:  # where nothing is prepared yet
        began = time.perf_counter()
        dataset = find_or_prepare(data, Path(folder), vocab_size=task.vocab_size)
        seconds = time.perf_counter() - began
    size = dataset.meta.train.bytes + dataset.meta.val.bytes
    return {"megabytes_per_second": size / 1e6 / seconds, **with_mlx("mlxgpt")}


def _model(task: Task) -> GPT:
    model = GPT(ModelConfig(**task.shape))  # with the weights that the folder has: contest.py
    mx.eval(model.parameters())
    return model


def with_mlx(package: str) -> Result:
    """What a package on MLX ran with; on a GPU, the most that MLX's arrays took, too."""
    made_with = {
        "versions": f"{package} {version(package)}, mlx {version('mlx')}",
        "device": device.backend(),
        "threads": str(blas.threads() or "MLX's own"),
        "BLAS": blas.status(),
        "compiler": compiler(),
    }
    return {"made_with": made_with, "peak_memory": device.peak_bytes()}
