"""AdamW in two parameter groups, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable

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


def learning_rate_schedule(config: Config) -> Callable[[int], mx.array]:
    """The learning rate as a function of the step, counted from 0: linear warmup, a cosine down to
    `min_lr_ratio` of the peak at `decay_steps`, then that floor.
    """
    o = config.optim
    peak, floor, warmup_steps = o.learning_rate, o.learning_rate * o.min_lr_ratio, o.warmup_steps
    cosine_steps = (o.decay_steps or config.train.max_steps) - warmup_steps

    def constant(step: int) -> mx.array:
        return mx.array(floor)

    decay = optim.cosine_decay(peak, cosine_steps, floor) if cosine_steps > 0 else constant
    if not warmup_steps:
        return decay
    warmup = optim.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optim.join_schedules([warmup, decay], [warmup_steps])
