"""The compiled training step. Shapes are fixed, so it is traced once; nothing here waits for the
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map, tree_unflatten

from mlxgpt.backend.cpu import jit as compiler
from mlxgpt.backend.cpu import parallel as lanes
from mlxgpt.backend.cpu.parallel import Lanes
from mlxgpt.config import Config
from mlxgpt.distributed.group import LOCAL, ProcessGroup
from mlxgpt.model.gpt import GPT, flat, must_be_like
from mlxgpt.model.losses import borrowed, token_losses
from mlxgpt.training.optimizer import OptimizerGroups, split_by_work
from mlxgpt.training.shares import Parts, share


def _not_compiled(function: Callable, **_: Any) -> Callable:
    return function


class TrainStep:
    """Loss, gradients, clipping and update of one step.

    Args:
        model: its parameters are the float32 master weights, updated in place.
        config: `train.dtype` must be resolved; see `device.resolve_dtype`.
        compiled: False runs the same operations one by one, to be compared with.
        group: the ranks that each compute a share of every batch.
    """

    def __init__(
        self, model: GPT, config: Config, *, compiled: bool = True, group: ProcessGroup = LOCAL
    ) -> None:
        self.model = model
        self.grad_clip = config.optim.grad_clip
        self.dtype = getattr(mx, config.train.dtype)
        self.reduce_dtype = getattr(mx, config.train.reduce_dtype)
        compile = compiler.compiled if compiled else _not_compiled
        self._lanes = Lanes(lambda: _Sums(compile(self._gradients_of), compile(_add)))
        self._mean = compile(self._mean_of)
        self._judge = compile(self._judged)
        self.group = group
        parameters = flat(model.trainable_parameters())
        self._shares = split_by_work(parameters, config.optim, lanes.count())
        self._optimizers = [
            OptimizerGroups(config.optim, {name: parameters[name] for name in names})
            for names in self._shares
        ]
        self._states = [optimizer.init() for optimizer in self._optimizers]
        updates = (compile(optimizer.update) for optimizer in self._optimizers)
        self._updates = Lanes(lambda: next(updates))

    @property
    def state(self) -> list[Any]:
        """Everything that a step changes: parameters and the optimizer's moments."""
        return [self.model.state, self._states]

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
            before clipping; on a GPU neither is computed yet.
        """
        loss, gradients = self.gradients(inputs, targets, key)
        loss, gradients = self.group.average(loss, flat(gradients), self.reduce_dtype)
        norm, scale, good = self._judge(gradients, loss, mx.array(limit))
        own, new = flat(self.model.trainable_parameters()), flat(gradients)
        updates = self._updates(
            (
                {n: own[n] for n in names},
                {n: new[n] for n in names},
                state,
                learning_rate,
                scale,
                good,
            )
            for names, state in zip(self._shares, self._states, strict=True)
        )
        self.model.update(
            tree_unflatten({n: p for parameters, _ in updates for n, p in parameters.items()})
        )
        self._states = [state for _, state in updates]
        return loss, norm

    def arrays(self) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
        """The parameters, and the optimizer's state, by their dotted names."""
        named: dict[str, mx.array] = {}
        for optimizer, state in zip(self._optimizers, self._states, strict=True):
            named |= optimizer.to_named(state)
        return flat(self.model.parameters()), named

    def restore(self, parameters: dict[str, mx.array], optimizer: dict[str, mx.array]) -> None:
        """Continue from saved arrays; raises UserError if they are another model's."""
        for saved, own in zip((parameters, optimizer), self.arrays(), strict=True):
            must_be_like(saved, own)
        self.model.update(tree_unflatten(parameters))
        self._states = [one.from_named(optimizer) for one in self._optimizers]

    def gradients(
        self, inputs: mx.array, targets: mx.array, key: mx.array
    ) -> tuple[mx.array, dict]:
        """Mean loss and its gradients over all micro-batches, which are equally large; of several
        ranks, over this one's share of them.
        """
        if self.group.size > 1:
            return self._gradients_of_share(inputs, targets, key)
        A, B, T = inputs.shape
        parts = Parts.of(A, B, T)
        L, P = parts.lanes, parts.each
        if parts.count > A:  # each lane has half of each micro-batch, in portions,
            inputs, targets = (
                ids.reshape(A, L, P, B // L // P, T).swapaxes(0, 1).flatten(1, 2)
                for ids in (inputs, targets)
            )
        else:  # or half of the micro-batches, or one lane has all
            inputs, targets = (ids.reshape(L, A // L, B, T) for ids in (inputs, targets))
        keys = mx.random.split(key, parts.count).reshape(L, parts.count // L, -1)
        return self._mean_over(L, inputs, targets, keys)

    def _gradients_of_share(
        self, inputs: mx.array, targets: mx.array, key: mx.array
    ) -> tuple[mx.array, dict]:
        A, B, T = inputs.shape
        mine = share(A, B, T, self.group.rank, self.group.size)
        L, count = mine.lanes, len(mine.pieces)
        shape = (L, count // L, mine.rows, T)
        rows = slice(mine.first, mine.first + count * mine.rows)
        inputs, targets = (ids.reshape(A * B, T)[rows].reshape(shape) for ids in (inputs, targets))
        of_parts = mx.random.split(key, Parts.of(A, B, T).count)
        numbers, firsts = zip(*mine.pieces, strict=True)
        keys = of_parts[mx.array(numbers)].reshape(L, count // L, -1)
        if mine.whole:
            return self._mean_over(L, inputs, targets, keys)
        places = mx.array(firsts).reshape(L, count // L, 1)
        return self._mean_over(L, inputs, targets, keys, places, [[mine.of] * (count // L)] * L)

    def _mean_over(self, L: int, *given: Any) -> tuple[mx.array, dict]:
        """Mean loss and gradients of what is given for each of L lanes."""
        parts = L * given[0].shape[1]
        parameters = self.model.trainable_parameters()
        sums = self._lanes(zip([parameters] * L, *given, strict=True))
        return self._mean(sums, mx.array(float(parts))) if parts > 1 else sums[0]

    def _gradients_of(
        self, parameters: dict, inputs: mx.array, targets: mx.array, key: mx.array, *part: Any
    ) -> tuple[mx.array, dict]:
        drawn_with = (key, *part) if part else key

        def mean_loss(parameters: dict) -> mx.array:
            self.model.update(tree_map(lambda p: p.astype(self.dtype), parameters))
            return token_losses(self.model(inputs, drawn_with), targets).mean()

        with borrowed(self.model):
            return mx.value_and_grad(mean_loss)(parameters)

    def _mean_of(self, sums: list[tuple[mx.array, dict]], parts: mx.array) -> tuple[mx.array, dict]:
        return tree_map(lambda *values: sum(values) / parts, *sums)

    def _judged(
        self, gradients: dict, loss: mx.array, limit: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The gradients' global norm, what clipping multiplies them by, and whether the step may be
        applied.
        """
        norm = mx.sqrt(sum((mx.square(g).sum() for g in flat(gradients).values()), mx.array(0.0)))
        scale = mx.minimum((self.grad_clip or math.inf) / (norm + 1e-6), 1.0)
        return norm, scale, mx.isfinite(loss) & mx.isfinite(norm) & (loss <= limit)


class _Sums:
    """One lane's losses and gradients of its micro-batches, added up one by one: the next is not
    begun before the sum so far is there, since each holds much more memory than the sum.
    """

    def __init__(self, gradients: Callable, add: Callable) -> None:
        self._gradients, self._add = gradients, add

    def __call__(self, parameters: dict, *batches: mx.array) -> tuple[mx.array, dict]:
        first, *others = zip(*batches, strict=True)
        total = self._gradients(parameters, *first)
        for batch in others:
            mx.async_eval(total)
            following = self._add(total, self._gradients(parameters, *batch))
            mx.eval(total)
            total = following
        return total


_add = partial(tree_map, mx.add)


def new_step(config: Config, *, compiled: bool = True, group: ProcessGroup = LOCAL) -> TrainStep:
    """The training step of a config, with a fresh model; its vocabulary and dtype are resolved."""
    t = config.train
    model = GPT(config.model, t.seed, gradient_checkpointing=t.gradient_checkpointing)
    return TrainStep(model, config, compiled=compiled, group=group)
