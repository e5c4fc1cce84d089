"""Optimizer with parameter groups: AdamW, optionally with Muon for the matrices of the blocks.

A skipped step is gated at the inputs of the update: zero gradient, zero learning rate, and decay
rates that leave the moments unchanged. A `where` around the results would keep `mx.compile` from
fusing AdamW's update of a parameter into one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import mlx.core as mx

from mlxgpt.config import OptimConfig
from mlxgpt.distributed.group import Arrays
from mlxgpt.training.muon import Muon


class ParamGroup(NamedTuple):
    """Parameters that share a learning rate and a weight decay."""

    matches: Callable[[str, mx.array], bool]
    lr_scale: float  # relative to AdamW's learning rate
    weight_decay: float


class OptimizerGroups:
    """Updates parameters with the settings of their groups. Stateless.

    AdamW (Loshchilov & Hutter, 2019) with bias correction, and weight decay on matrices and
    embeddings but not on biases and norms, as in nanoGPT. Optionally Muon on the matrices of the
    blocks. If embeddings have a separate learning rate they are not decayed, since most of their
    rows have no gradient in a step.

    Args:
        parameters: parameters to update, by dotted name.
    """

    def __init__(self, config: OptimConfig, parameters: Mapping[str, mx.array]) -> None:
        self._config = config
        self._param_groups = _make_param_groups(config)
        # A parameter belongs to the first group that matches it.
        self._group_index = {
            name: next(
                n for n, group in enumerate(self._param_groups) if group.matches(name, parameter)
            )
            for name, parameter in parameters.items()
        }
        muon_shapes = {n: p.shape for n, p in parameters.items() if _uses_muon(config, n, p)}
        self._muon = Muon(muon_shapes) if muon_shapes else None
        self._adamw_shapes = {n: p.shape for n, p in parameters.items() if n not in muon_shapes}

    def init(self) -> Arrays:
        """The state before the first step, with zero moments."""
        state = {"step": mx.array(0, mx.uint64)}
        state["rates"] = mx.full(len(self._param_groups), self._config.learning_rate)
        for name, shape in self._adamw_shapes.items():
            state[f"{name}.m"], state[f"{name}.v"] = mx.zeros(shape), mx.zeros(shape)
        return state | (self._muon.init() if self._muon else {})

    def update(
        self,
        parameters: Arrays,
        gradients: Arrays,
        state: Arrays,
        learning_rate: mx.array,
        scale: mx.array,
        should_apply: mx.array,
    ) -> tuple[Arrays, Arrays]:
        """Update with scale * gradients. Returns the new parameters and state, both unchanged if
        not `should_apply`, except that -0.0 may become 0.0.
        """
        c = self._config
        keep1, add1, keep2, add2, eps = mx.where(
            should_apply,
            # 1 - beta is computed in Python, since arrays would round differently.
            mx.array([c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2, c.eps]),
            mx.array([1.0, 0.0, 1.0, 0.0, 1.0]),
        )
        lr_scales = mx.array([group.lr_scale for group in self._param_groups])
        decays = mx.array([group.weight_decay for group in self._param_groups])
        learning_rates = mx.where(should_apply, learning_rate, 0.0) * lr_scales
        n = state["step"] + 1  # not gated: if step 1 is skipped, 1 - beta**0 would divide by 0
        # Split each array only once, since MLX 0.32 fails to compile two splits of one array.
        group_rates, decay_factors, step_sizes = (
            [*values]
            for values in (
                learning_rates,
                1 - learning_rates * decays,
                learning_rates / (1 - c.beta1**n),
            )
        )
        bias_correction2_rsqrt = mx.rsqrt(1 - c.beta2**n)
        new_state = {
            "step": state["step"] + should_apply,
            "rates": mx.where(should_apply, learning_rate * lr_scales, state["rates"]),
        }
        new_parameters = {}
        for name in self._adamw_shapes:
            gradient = mx.where(should_apply, scale * gradients[name], 0.0)
            m = keep1 * state[f"{name}.m"] + add1 * gradient
            v = keep2 * state[f"{name}.v"] + add2 * mx.square(gradient)
            new_state |= {f"{name}.m": m, f"{name}.v": v}
            group = self._group_index[name]
            step = step_sizes[group] * m / (mx.sqrt(v) * bias_correction2_rsqrt + eps)
            new_parameters[name] = parameters[name] * decay_factors[group] - step
        if self._muon:
            updates, moments = self._muon.update(gradients, state, scale, should_apply)
            new_state |= moments
            new_parameters |= {
                name: parameters[name] * decay_factors[0] - group_rates[0] * update
                for name, update in updates.items()
            }
        return new_parameters, new_state

    def to_state_dict(self, state: Arrays) -> Arrays:
        """The state by its names in checkpoints: states.GROUP.step, states.GROUP.learning_rate and
        states.GROUP.PARAMETER.MOMENT.
        """
        state_dict: Arrays = {}
        for group, rate in enumerate(state["rates"]):
            state_dict |= {
                f"states.{group}.step": state["step"],
                f"states.{group}.learning_rate": rate,
            }
        for name in self._adamw_shapes:
            for moment in ("m", "v"):
                state_dict[self._state_key(name, moment)] = state[f"{name}.{moment}"]
        for name, moment, value in self._muon.split(state) if self._muon else ():
            state_dict[self._state_key(name, moment)] = value
        return state_dict

    def from_state_dict(self, state_dict: Arrays) -> Arrays:
        """Inverse of `to_state_dict`; `state_dict` may also contain other parameters."""
        rates = [
            state_dict[f"states.{group}.learning_rate"] for group in range(len(self._param_groups))
        ]
        state = {"step": state_dict["states.0.step"], "rates": mx.stack(rates)}
        for name in self._adamw_shapes:
            for moment in ("m", "v"):
                state[f"{name}.{moment}"] = state_dict[self._state_key(name, moment)]
        if self._muon:
            state |= self._muon.join(lambda name, moment: state_dict[self._state_key(name, moment)])
        return state

    def _state_key(self, name: str, moment: str) -> str:
        return f"states.{self._group_index[name]}.{name}.{moment}"


def _make_param_groups(config: OptimConfig) -> list[ParamGroup]:
    base = config.learning_rate or math.inf  # a learning rate of 0 disables all groups
    groups = []
    if config.optimizer == "muon":
        groups.append(
            ParamGroup(_is_block_matrix, config.muon_learning_rate / base, config.weight_decay)
        )
    if config.embedding_learning_rate:
        groups.append(ParamGroup(_has_embedding_rate, config.embedding_learning_rate / base, 0.0))
    return [
        *groups,
        ParamGroup(_is_matrix, 1.0, config.weight_decay),
        ParamGroup(_is_any, 1.0, 0.0),
    ]


def _is_any(name: str, parameter: mx.array) -> bool:
    return True


def _is_matrix(name: str, parameter: mx.array) -> bool:
    return parameter.ndim >= 2


def _has_embedding_rate(name: str, parameter: mx.array) -> bool:
    return name.startswith(("wte.", "wve.")) or "smear.gate." in name or ".value_gate." in name


def _is_block_matrix(name: str, parameter: mx.array) -> bool:
    return (
        _is_matrix(name, parameter)
        and name.startswith("h.")
        and not _has_embedding_rate(name, parameter)
    )


def _uses_muon(config: OptimConfig, name: str, parameter: mx.array) -> bool:
    return config.optimizer == "muon" and _is_block_matrix(name, parameter)


ADAMW_WORK = 50  # per value, measured; Muon's is the matrix's smaller dimension


def split_by_work(parameters: Arrays, config: OptimConfig, count: int) -> list[list[str]]:
    """Split parameter names into `count` parts whose updates take about equally long."""
    work = {}
    for name, parameter in parameters.items():
        uses_muon = _uses_muon(config, name, parameter)
        work[name] = parameter.size * (min(parameter.shape) if uses_muon else ADAMW_WORK)
    parts: list[list[str]] = [[] for _ in range(count)]
    for name in sorted(work, key=lambda name: work[name], reverse=True):
        min(parts, key=lambda part: sum(work[name] for name in part)).append(name)
    return parts
