"""The optimizer by parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from mlxgpt.config import Config, OptimConfig
from mlxgpt.training.muon import Muon

MOMENTUM = 0.95  # Muon's, as Jordan's


def make_optimizer(config: OptimConfig) -> optim.MultiOptimizer:
    """AdamW (Loshchilov & Hutter, 2019) with bias correction; weight decay on matrices and
    embeddings, none on biases and layer norms, as nanoGPT. Or Muon on the matrices of the blocks.
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

    if config.optimizer == "adamw":
        return optim.MultiOptimizer([adamw(config.weight_decay), adamw(0.0)], [_decays])

    # What a step is given is AdamW's rate; without one nothing is learned at all.
    relative_rate = config.muon_learning_rate / (config.learning_rate or math.inf)
    muon = Muon(relative_rate, MOMENTUM, config.weight_decay)
    return optim.MultiOptimizer(
        [muon, adamw(config.weight_decay), adamw(0.0)], [_of_blocks, _decays]
    )


def _decays(name: str, parameter: mx.array) -> bool:
    return parameter.ndim >= 2


def _of_blocks(name: str, parameter: mx.array) -> bool:
    return _decays(name, parameter) and name.startswith("h.")


def shared_out(parameters: dict[str, mx.array], config: OptimConfig, count: int) -> list[list[str]]:
    """The names of the parameters in `count` shares whose updates take about equally long."""
    work = {}
    for name, parameter in parameters.items():
        by_muon = config.optimizer == "muon" and _of_blocks(name, parameter)
        work[name] = parameter.size * (min(parameter.shape) if by_muon else 1)
    shares: list[list[str]] = [[] for _ in range(count)]
    for name in sorted(work, key=lambda name: work[name], reverse=True):
        min(shares, key=lambda share: sum(work[name] for name in share)).append(name)
    return shares


def learning_rate_schedule(config: Config) -> Callable[[int], mx.array]:
    """The learning rate as a function of the step, counted from 0: linear warmup, then down to
    `min_lr_ratio` of the peak at `decay_steps`, by a cosine, or by a straight line over the last
    `cooldown` of them; then that floor.
    """
    o = config.optim
    peak, floor, warmup_steps = o.learning_rate, o.learning_rate * o.min_lr_ratio, o.warmup_steps
    last = o.decay_steps or config.train.max_steps
    decay_steps = last - warmup_steps
    flat = max(0, round(last * (1 - o.cooldown)) - warmup_steps)

    def constant(step: int) -> mx.array:
        return mx.array(floor)

    if decay_steps <= 0:
        decay = constant
    elif o.schedule == "cosine":
        decay = optim.cosine_decay(peak, decay_steps, floor)
    else:
        line = optim.linear_schedule(peak, floor, max(1, decay_steps - flat))
        decay = optim.join_schedules([lambda _: mx.array(peak), line], [flat]) if flat else line
    if not warmup_steps:
        return decay
    warmup = optim.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optim.join_schedules([warmup, decay], [warmup_steps])
