"""AdamW in two parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers as optim

from mlxgpt.config import Config, OptimConfig


def make_optimizer(config: OptimConfig) -> optim.MultiOptimizer:
    """AdamW (Loshchilov & Hutter, 2019) with bias correction; weight decay on matrices and
    embeddings, none on biases and layer norms, as nanoGPT.
    """

    def adamw(weight_decay: float) -> optim.AdamW:
        return optim.AdamW(
            learning_rate=config.learning_rate,
            betas=[config.beta1, config.beta2],
            eps=config.eps,
            weight_decay=weight_decay,
            bias_correction=True,  # off by default in MLX
        )

    def decays(name: str, parameter: mx.array) -> bool:
        return parameter.ndim >= 2

    return optim.MultiOptimizer([adamw(config.weight_decay), adamw(0.0)], [decays])


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of a step, counted from 0: linear warmup, a cosine down to `min_lr_ratio`
    of the peak at `decay_steps`, then that floor.
    """
    o = config.optim
    decay_steps = o.decay_steps or config.train.max_steps
    if step < o.warmup_steps:
        return o.learning_rate * (step + 1) / (o.warmup_steps + 1)
    if step >= decay_steps:
        return o.learning_rate * o.min_lr_ratio
    progress = (step - o.warmup_steps) / (decay_steps - o.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return o.learning_rate * (o.min_lr_ratio + (1 - o.min_lr_ratio) * cosine)
