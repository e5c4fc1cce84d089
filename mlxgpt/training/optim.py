"""The optimizer by parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from mlxgpt.config import Config, OptimConfig
from mlxgpt.training.muon import Muon

MOMENTUM = 0.95  # Muon's, as Jordan's
ADAMWS_WORK = 50  # for a number, in what Muon takes for one in a matrix that is 1 wide (measured)


Takes = Callable[[str, mx.array], bool]  # which parameters, by name and array


class Groups(optim.MultiOptimizer):
    """Several optimizers, each for some of the parameters, and with a learning rate of its own.

    Args:
        groups: (optimizer, its rate as a multiple of the one that is set, which parameters); a
            parameter belongs to the first that takes it, and the last one takes all the others.
    """

    def __init__(self, *groups: tuple[optim.Optimizer, float, Takes]) -> None:
        super().__init__([one for one, _, _ in groups], [takes for *_, takes in groups[:-1]])
        self._multiples = [multiple for _, multiple, _ in groups]

    def set_learning_rate(self, rate: mx.array) -> None:
        """Set AdamW's rate, and with it all others."""
        for optimizer, multiple in zip(self.optimizers, self._multiples, strict=True):
            optimizer.learning_rate = rate * multiple


def make_optimizer(config: OptimConfig) -> Groups:
    """AdamW (Loshchilov & Hutter, 2019) with bias correction; weight decay on matrices and
    embeddings, none on biases and norms, as nanoGPT. Or Muon on the matrices of the blocks; and
    embeddings that have a rate of their own are not decayed: most rows have no gradient in a step.
    """

    def adamw(weight_decay: float) -> optim.AdamW:
        return optim.AdamW(
            learning_rate=config.learning_rate,
            betas=[config.beta1, config.beta2],
            eps=config.eps,
            weight_decay=weight_decay,
            bias_correction=True,  # off by default in MLX
        )

    def multiple(rate: float) -> float:
        # What a step is given is AdamW's rate; without one nothing is learned at all.
        return rate / (config.learning_rate or math.inf)

    groups: list[tuple[optim.Optimizer, float, Takes]] = []
    if config.optimizer == "muon":
        muon = Muon(MOMENTUM, config.weight_decay)
        groups.append((muon, multiple(config.muon_learning_rate), _of_blocks))
    if config.embedding_learning_rate:
        groups.append((adamw(0.0), multiple(config.embedding_learning_rate), _is_embedding))
    groups.append((adamw(config.weight_decay), 1.0, _decays))
    groups.append((adamw(0.0), 1.0, _any))
    return Groups(*groups)


def _is_embedding(name: str, parameter: mx.array) -> bool:
    return name.startswith(("wte.", "wve."))


def _any(name: str, parameter: mx.array) -> bool:
    return True


def _decays(name: str, parameter: mx.array) -> bool:
    return parameter.ndim >= 2


def _of_blocks(name: str, parameter: mx.array) -> bool:
    return _decays(name, parameter) and name.startswith("h.")


def shared_out(parameters: dict[str, mx.array], config: OptimConfig, count: int) -> list[list[str]]:
    """The names of the parameters in `count` shares whose updates take about equally long."""
    work = {}
    for name, parameter in parameters.items():
        by_muon = config.optimizer == "muon" and _of_blocks(name, parameter)
        work[name] = parameter.size * (min(parameter.shape) if by_muon else ADAMWS_WORK)
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
