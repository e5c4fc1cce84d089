"""The compiled steps: training and evaluation. (Decoding's is in generation.py, with its sampler.)

Shapes are fixed, so each is traced once. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlxgpt.config import Config
from mlxgpt.model import GPT, load_parameters
from mlxgpt.optim import make_optimizer


def scalar(value: mx.array) -> float:
    """The number in an array of one; waits for it."""
    return float(np.array(value))


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
        compile = mx.compile if compiled else _not_compiled
        inputs = [model.state]
        self._gradients = compile(self._gradients_of, inputs=inputs)
        both = [model.state, self.optimizer.state]
        self._apply = compile(self._apply_gradients, inputs=both, outputs=both)
        self._add = compile(partial(tree_map, mx.add))

    @property
    def state(self) -> list[Any]:
        """Everything that a step changes: parameters and the optimizer's moments."""
        return [self.model.state, self.optimizer.state]

    def __call__(
        self, inputs: mx.array, targets: mx.array, learning_rate: float, key: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Take one step.

        Args:
            inputs, targets: ids[A, B, T], int32.
            learning_rate: of this step.
            key: for dropout; each micro-batch gets its own from it.

        Returns:
            The mean loss in nats per token before the update, and the gradient's global norm
            before clipping; neither is computed yet.
        """
        loss, gradients = self.gradients(inputs, targets, key)
        return loss, self._apply(gradients, mx.array(learning_rate))

    def restore(self, parameters: dict, optimizer: dict) -> None:
        """Continue from saved trees; raises UserError if they are another model's."""
        load_parameters(self.model, parameters)
        for part, saved in zip(self.optimizer.optimizers, optimizer["states"], strict=True):
            part.state.update(saved)  # in place: the compiled functions hold these dicts

    def gradients(
        self, inputs: mx.array, targets: mx.array, key: mx.array
    ) -> tuple[mx.array, dict]:
        """Mean loss and its gradients over all micro-batches, which are equally large."""
        keys = mx.random.split(key, self.micro_batches)
        loss, gradients = self._gradients(inputs[0], targets[0], keys[0])
        for a in range(1, self.micro_batches):
            more, new = self._gradients(inputs[a], targets[a], keys[a])
            loss, gradients = loss + more, self._add(gradients, new)
        return loss / self.micro_batches, gradients

    def _gradients_of(
        self, inputs: mx.array, targets: mx.array, key: mx.array
    ) -> tuple[mx.array, dict]:
        master = self.model.trainable_parameters()

        def mean_loss(parameters: dict) -> mx.array:
            self.model.update(tree_map(lambda p: p.astype(self.dtype), parameters))
            return token_losses(self.model(inputs, key), targets).mean()

        loss, gradients = mx.value_and_grad(mean_loss)(master)
        self.model.update(master)
        return loss, gradients

    def _apply_gradients(self, gradients: dict, learning_rate: mx.array) -> mx.array:
        if self.micro_batches > 1:
            gradients = tree_map(lambda g: g / self.micro_batches, gradients)
        limit = self.grad_clip or float("inf")
        gradients, norm = optim.clip_grad_norm(gradients, limit)
        self.optimizer.learning_rate = learning_rate
        self.optimizer.update(self.model, gradients)
        return norm


def token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy of each token in nats, [B, T], in float32; targets must be below V."""
    return nn.losses.cross_entropy(logits.astype(mx.float32), targets)


def make_eval_step(model: GPT, dtype: mx.Dtype) -> Callable[..., mx.array]:
    """A compiled function (inputs[B, T], targets[B, T], mask[B, T]) -> summed loss of the tokens
    where the mask is 1, in nats.
    """

    def evaluate(inputs: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
        master = model.parameters()
        model.update(tree_map(lambda p: p.astype(dtype), master))
        losses = token_losses(model(inputs), targets)
        model.update(master)
        return (losses * mask).sum()

    return mx.compile(evaluate, inputs=[model.state])
