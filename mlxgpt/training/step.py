"""The compiled training step. Shapes are fixed, so it is traced once; nothing here waits for the
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map, tree_unflatten

from mlxgpt.config import Config
from mlxgpt.machine import compiler
from mlxgpt.model import lanes
from mlxgpt.model.gpt import GPT, flat, must_be_like
from mlxgpt.model.lanes import Lanes
from mlxgpt.model.losses import borrowed, token_losses
from mlxgpt.training.optim import make_optimizer


def _not_compiled(function: Callable, **_: Any) -> Callable:
    return function


class TrainStep:
    """Loss, gradients, clipping and update of one step.

    Args:
        model: its parameters are the float32 master weights, updated in place.
        config: `train.dtype` must be resolved; see `device.resolve_dtype`.
        compiled: False runs the same operations one by one, to be compared with.
    """

    def __init__(self, model: GPT, config: Config, *, compiled: bool = True) -> None:
        self.model = model
        self.optimizer = make_optimizer(config.optim)
        self.optimizer.init(model.trainable_parameters())
        self.micro_batches = config.train.gradient_accumulation_steps
        self.grad_clip = config.optim.grad_clip
        self.dtype = getattr(mx, config.train.dtype)
        compile = compiler.compiled if compiled else _not_compiled
        self._lanes = Lanes(lambda: _Sums(compile(self._gradients_of), compile(_add)))
        self._mean = compile(self._mean_of)
        both = [model.state, self.optimizer.state]
        self._apply = compile(self._apply_gradients, inputs=both, outputs=both)

    @property
    def state(self) -> list[Any]:
        """Everything that a step changes: parameters and the optimizer's moments."""
        return [self.model.state, self.optimizer.state]

    def __call__(
        self,
        inputs: mx.array,
        targets: mx.array,
        learning_rate: mx.array,
        key: mx.array,
        limit: float = math.inf,
    ) -> tuple[mx.array, mx.array]:
        """Take one step. Where the loss or the gradient is not finite, or the loss is above
        `limit`, it changes nothing.

        Args:
            inputs, targets: ids[A, B, T], int32.
            learning_rate: of this step.
            key: for dropout; each micro-batch gets its own from it.
            limit: the largest loss that the step is applied with.

        Returns:
            The mean loss in nats per token before the update, and the gradient's global norm
            before clipping; neither is computed yet.
        """
        loss, gradients = self.gradients(inputs, targets, key)
        return loss, self._apply(gradients, loss, learning_rate, mx.array(limit))

    def arrays(self) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
        """The parameters, and the optimizer's state, by their dotted names."""
        return flat(self.model.parameters()), flat(self.optimizer.state)

    def restore(self, parameters: dict[str, mx.array], optimizer: dict[str, mx.array]) -> None:
        """Continue from saved arrays; raises UserError if they are another model's."""
        for saved, own in zip((parameters, optimizer), self.arrays(), strict=True):
            must_be_like(saved, own)
        self._put(parameters, optimizer)

    def gradients(
        self, inputs: mx.array, targets: mx.array, key: mx.array
    ) -> tuple[mx.array, dict]:
        """Mean loss and its gradients over all micro-batches, which are equally large."""
        A, B, T = inputs.shape
        L = lanes.count() if B % lanes.count() == 0 else 1
        keys = mx.random.split(key, L * A).reshape(L, A, -1)
        inputs, targets = (ids.reshape(A, L, B // L, T).swapaxes(0, 1) for ids in (inputs, targets))
        parameters = self.model.trainable_parameters()
        shares = zip([parameters] * L, inputs, targets, keys, strict=True)
        sums = self._lanes(shares)
        return self._mean(sums) if L * A > 1 else sums[0]

    def _gradients_of(
        self, parameters: dict, inputs: mx.array, targets: mx.array, key: mx.array
    ) -> tuple[mx.array, dict]:
        def mean_loss(parameters: dict) -> mx.array:
            self.model.update(tree_map(lambda p: p.astype(self.dtype), parameters))
            return token_losses(self.model(inputs, key), targets).mean()

        with borrowed(self.model):
            return mx.value_and_grad(mean_loss)(parameters)

    def _mean_of(self, sums: list[tuple[mx.array, dict]]) -> tuple[mx.array, dict]:
        parts = len(sums) * self.micro_batches
        return tree_map(lambda *values: sum(values) / parts, *sums)

    def _apply_gradients(
        self, gradients: dict, loss: mx.array, learning_rate: mx.array, limit: mx.array
    ) -> mx.array:
        before = self.arrays()
        gradients, norm = optim.clip_grad_norm(gradients, self.grad_clip or math.inf)
        self.optimizer.learning_rate = learning_rate
        self.optimizer.update(self.model, gradients)
        good = mx.isfinite(loss) & mx.isfinite(norm) & (loss <= limit)
        after = (
            {name: mx.where(good, value, old[name]) for name, value in new.items()}
            for old, new in zip(before, self.arrays(), strict=True)
        )
        self._put(*after)
        return norm

    def _put(self, parameters: dict[str, mx.array], optimizer: dict[str, mx.array]) -> None:
        self.model.update(tree_unflatten(parameters))
        states = tree_unflatten(optimizer)["states"]
        for part, state in zip(self.optimizer.optimizers, states, strict=True):
            part.state.update(state)  # in place: the compiled functions hold these dicts


class _Sums:
    """One lane's losses and gradients of its micro-batches, added up."""

    def __init__(self, gradients: Callable, add: Callable) -> None:
        self._gradients, self._add = gradients, add

    def __call__(self, parameters: dict, *batches: mx.array) -> tuple[mx.array, dict]:
        first, *others = zip(*batches, strict=True)
        total = self._gradients(parameters, *first)
        for batch in others:
            total = self._add(total, self._gradients(parameters, *batch))
        return total


_add = partial(tree_map, mx.add)


def new_step(config: Config, *, compiled: bool = True) -> TrainStep:
    """The training step of a config, with a fresh model; its vocabulary and dtype are resolved."""
    t = config.train
    model = GPT(config.model, t.seed, gradient_checkpointing=t.gradient_checkpointing)
    return TrainStep(model, config, compiled=compiled)
