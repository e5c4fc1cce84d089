"""The optimizer: AdamW, and Muon where the config asks for it, each for a group of parameters.

A skipped step is gated at the inputs of the update: a gradient of 0, a learning rate of 0, and
moments that keep all and take in nothing. A `where` around the results would keep `mx.compile`
from fusing AdamW's update of a parameter into one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import mlx.core as mx

from mlxgpt.config import OptimConfig
from mlxgpt.training.muon import Arrays, Muon

ADAMWS_WORK = 50  # for a number, in what Muon takes for one in a matrix that is 1 wide (measured)


class Group(NamedTuple):
    """Parameters with a learning rate and a weight decay of their own."""

    takes: Callable[[str, mx.array], bool]
    multiple: float  # of AdamW's learning rate
    weight_decay: float


class OptimizerGroups:
    """Updates parameters, each as its group says; holds no state itself.

    AdamW (Loshchilov & Hutter, 2019) with bias correction; weight decay on matrices and embeddings,
    none on biases and norms, as nanoGPT. Or Muon on the matrices of the blocks; and embeddings with
    a learning rate of their own are not decayed: most rows have no gradient in a step.

    Args:
        parameters: those to update, by dotted names.
    """

    def __init__(self, config: OptimConfig, parameters: Mapping[str, mx.array]) -> None:
        self._config = config
        self._groups = _groups(config)
        # A parameter belongs to the first group that takes it.
        self._group = {
            name: next(n for n, group in enumerate(self._groups) if group.takes(name, parameter))
            for name, parameter in parameters.items()
        }
        by_muon = {n: p.shape for n, p in parameters.items() if _by_muon(config, n, p)}
        self._muon = Muon(by_muon) if by_muon else None
        self._by_adamw = {n: p.shape for n, p in parameters.items() if n not in by_muon}

    def init(self) -> Arrays:
        """The state before the first step."""
        state = {"step": mx.array(0, mx.uint64)}
        state["rates"] = mx.full(len(self._groups), self._config.learning_rate)
        for name, shape in self._by_adamw.items():
            state[f"{name}.m"], state[f"{name}.v"] = mx.zeros(shape), mx.zeros(shape)
        return state | (self._muon.init() if self._muon else {})

    def update(
        self,
        parameters: Arrays,
        gradients: Arrays,
        state: Arrays,
        learning_rate: mx.array,
        scale: mx.array,
        good: mx.array,
    ) -> tuple[Arrays, Arrays]:
        """The parameters and the state after a step by scale * gradients; both as they were if it
        is not `good`, except that -0.0 may become 0.0.
        """
        c = self._config
        keep1, add1, keep2, add2, eps = mx.where(
            good,
            # 1 - beta in Python: of arrays it would have other bits.
            mx.array([c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2, c.eps]),
            mx.array([1.0, 0.0, 1.0, 0.0, 1.0]),
        )
        multiples = mx.array([group.multiple for group in self._groups])
        decays = mx.array([group.weight_decay for group in self._groups])
        rates = mx.where(good, learning_rate, 0.0) * multiples
        n = state["step"] + 1  # not gated: 1 - beta**0 would be 0, and the first step may be bad
        # MLX 0.32 fails to compile two splits of one array: so each of these is split once.
        rate, shrink, size = (
            [*of_groups] for of_groups in (rates, 1 - rates * decays, rates / (1 - c.beta1**n))
        )
        root = mx.rsqrt(1 - c.beta2**n)
        after = {
            "step": state["step"] + good,
            "rates": mx.where(good, learning_rate * multiples, state["rates"]),
        }
        updated = {}
        for name in self._by_adamw:
            gradient = mx.where(good, scale * gradients[name], 0.0)
            m = keep1 * state[f"{name}.m"] + add1 * gradient
            v = keep2 * state[f"{name}.v"] + add2 * mx.square(gradient)
            after |= {f"{name}.m": m, f"{name}.v": v}
            step = size[self._group[name]] * m / (mx.sqrt(v) * root + eps)
            updated[name] = parameters[name] * shrink[self._group[name]] - step
        if self._muon:
            steps, moments = self._muon.update(gradients, state, scale, good)
            after |= moments
            updated |= {n: parameters[n] * shrink[0] - rate[0] * step for n, step in steps.items()}
        return updated, after

    def to_named(self, state: Arrays) -> Arrays:
        """A state by the names that checkpoints have: states.GROUP.step, states.GROUP.learning_rate
        and states.GROUP.PARAMETER.MOMENT.
        """
        named: Arrays = {}
        for group, rate in enumerate(state["rates"]):
            named |= {f"states.{group}.step": state["step"], f"states.{group}.learning_rate": rate}
        for name in self._by_adamw:
            for moment in ("m", "v"):
                named[self._named(name, moment)] = state[f"{name}.{moment}"]
        for name, moment, value in self._muon.split(state) if self._muon else ():
            named[self._named(name, moment)] = value
        return named

    def from_named(self, named: Arrays) -> Arrays:
        """The state of what `to_named` gave, among that of other parameters."""
        rates = [named[f"states.{group}.learning_rate"] for group in range(len(self._groups))]
        state = {"step": named["states.0.step"], "rates": mx.stack(rates)}
        for name in self._by_adamw:
            for moment in ("m", "v"):
                state[f"{name}.{moment}"] = named[self._named(name, moment)]
        if self._muon:
            state |= self._muon.joined(lambda name, moment: named[self._named(name, moment)])
        return state

    def _named(self, name: str, moment: str) -> str:
        return f"states.{self._group[name]}.{name}.{moment}"


def _groups(config: OptimConfig) -> list[Group]:
    base = config.learning_rate or math.inf  # without one nothing is learned at all
    groups = []
    if config.optimizer == "muon":
        groups.append(Group(_in_block, config.muon_learning_rate / base, config.weight_decay))
    if config.embedding_learning_rate:
        groups.append(Group(_is_embedding, config.embedding_learning_rate / base, 0.0))
    return [*groups, Group(_is_matrix, 1.0, config.weight_decay), Group(_is_any, 1.0, 0.0)]


def _is_any(name: str, parameter: mx.array) -> bool:
    return True


def _is_matrix(name: str, parameter: mx.array) -> bool:
    return parameter.ndim >= 2


def _is_embedding(name: str, parameter: mx.array) -> bool:
    return name.startswith(("wte.", "wve."))


def _in_block(name: str, parameter: mx.array) -> bool:
    return _is_matrix(name, parameter) and name.startswith("h.")


def _by_muon(config: OptimConfig, name: str, parameter: mx.array) -> bool:
    return config.optimizer == "muon" and _in_block(name, parameter)


def split_by_work(parameters: Arrays, config: OptimConfig, count: int) -> list[list[str]]:
    """The names of the parameters in `count` parts whose updates take about equally long."""
    work = {}
    for name, parameter in parameters.items():
        by_muon = _by_muon(config, name, parameter)
        work[name] = parameter.size * (min(parameter.shape) if by_muon else ADAMWS_WORK)
    parts: list[list[str]] = [[] for _ in range(count)]
    for name in sorted(work, key=lambda name: work[name], reverse=True):
        min(parts, key=lambda part: sum(work[name] for name in part)).append(name)
    return parts
