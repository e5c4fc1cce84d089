"""Compiled training step: forward and backward pass, gradient clipping, optimizer update. Shapes
are fixed, so each function is traced once. It waits for the device only between micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from mlxgpt.backend import execution
from mlxgpt.config import Config
from mlxgpt.data.example_array import SplitArray
from mlxgpt.data.token_array import Batch
from mlxgpt.distributed.group import LOCAL_GROUP, Arrays, ProcessGroup
from mlxgpt.model.gpt import GPT
from mlxgpt.model.lora import add_lora
from mlxgpt.model.losses import (
    answer_logprobs,
    dpo_losses,
    swapped_parameters,
    training_losses,
)
from mlxgpt.model.parameters import check_shapes, flatten_params, load_parameters
from mlxgpt.training.finetune import InitWeights
from mlxgpt.training.optimizer import OptimizerGroups, split_by_work
from mlxgpt.training.schedule import learning_rate_schedule
from mlxgpt.utils.errors import UserError
from mlxgpt.utils.seeds import derive_seed

Shard = list[tuple[Batch, mx.array]]  # a thread's parts of a batch [B, T], with dropout keys


def _identity(function: Callable) -> Callable:
    return function


class TrainStep:
    """Training step: loss, gradients, clipping and optimizer update.

    Args:
        model: its trainable parameters are the float32 master weights, updated in place.
        config: `train.dtype` must be resolved; see `device.resolve_dtype`.
        group: the ranks that train together, each on its rows of every batch.
        compiled: False runs the same operations uncompiled, for comparison.
    """

    def __init__(
        self,
        model: GPT,
        config: Config,
        group: ProcessGroup = LOCAL_GROUP,
        *,
        compiled: bool = True,
    ) -> None:
        self.model, self.config, self.group = model, config, group
        self.dtype = getattr(mx, config.train.dtype)
        self._grad_clip = config.optim.grad_clip or math.inf
        self._reduce_dtype = getattr(mx, config.train.reduce_dtype)
        compile_function = execution.compile_function if compiled else _identity
        # On the CPU each worker thread has its own functions and optimizer; a GPU has one of each.
        self._threaded_gradients = execution.PerThreadFunction(
            lambda: _GradientAccumulator(compile_function(self._add_gradients))
        )
        self._compiled_norm_and_scale = compile_function(self._compute_norm_and_scale)
        parameters = flatten_params(model.trainable_parameters())
        self._parameter_names = split_by_work(parameters, config.optim, execution.thread_count())
        self._optimizers = [
            OptimizerGroups(config.optim, {name: parameters[name] for name in names})
            for names in self._parameter_names
        ]
        self._states = [optimizer.init() for optimizer in self._optimizers]
        updates = (compile_function(optimizer.update) for optimizer in self._optimizers)
        self._threaded_updates = execution.PerThreadFunction(lambda: next(updates))

    @property
    def state(self) -> list[Any]:
        """Everything that a step changes: parameters and optimizer state."""
        return [self.model.state, self._states]

    def __call__(
        self,
        batch: Batch,
        learning_rate: mx.array,
        key: mx.array,
        loss_limit: float = math.inf,
    ) -> tuple[mx.array, mx.array]:
        """Take one step. It is skipped, and changes nothing, if the loss or gradient is not finite,
        or the loss is above `loss_limit`.

        Args:
            batch: of shape [A, B, T], as MLX arrays.
            learning_rate: learning rate of this step, scalar [].
            key: dropout key; split for the micro-batches.
            loss_limit: largest loss for which the step is applied.

        Returns:
            Mean loss before the update, in nats per token or pair, and global gradient norm
            before clipping; on a GPU both are still lazy.
        """
        loss, gradients, part_count = self._sum_gradients(batch, key)
        loss, gradients = self.group.average(loss, gradients, self._reduce_dtype)
        loss, grad_norm, scale, should_apply = self._compiled_norm_and_scale(
            loss, gradients, mx.array(part_count), mx.array(loss_limit)
        )
        parameters = flatten_params(self.model.trainable_parameters())
        results = self._threaded_updates(
            (
                {name: parameters[name] for name in names},
                {name: gradients[name] for name in names},
                state,
                learning_rate,
                scale,
                should_apply,
            )
            for names, state in zip(self._parameter_names, self._states, strict=True)
        )
        self.model.update(tree_unflatten({n: p for new, _ in results for n, p in new.items()}))
        self._states = [state for _, state in results]
        return loss, grad_norm

    def compute_gradients(self, batch: Batch, key: mx.array) -> tuple[mx.array, Arrays]:
        """Mean loss of a batch, and its gradients by name."""
        loss, gradients, part_count = self._sum_gradients(batch, key)
        return loss / part_count, {
            name: gradient / part_count for name, gradient in gradients.items()
        }

    def state_dicts(self) -> tuple[Arrays, Arrays]:
        """Trained parameters and optimizer state, each by dotted name."""
        optimizer_state: Arrays = {}
        for optimizer, state in zip(self._optimizers, self._states, strict=True):
            optimizer_state |= optimizer.to_state_dict(state)
        return flatten_params(self.model.trainable_parameters()), optimizer_state

    def restore(self, parameters: Arrays, optimizer: Arrays) -> None:
        """Restore saved parameters and optimizer state; raises UserError if they do not match."""
        for saved, current in zip((parameters, optimizer), self.state_dicts(), strict=True):
            check_shapes(saved, current)
        self.model.update(tree_unflatten(parameters))
        self._states = [groups.from_state_dict(optimizer) for groups in self._optimizers]

    def _sum_gradients(self, batch: Batch, key: mx.array) -> tuple[mx.array, Arrays, float]:
        """Sums of loss and gradients over the parts of a batch, and the number of parts. The parts
        are the micro-batches, divided further on the CPU.
        """
        shards = execution.shard_batch(batch, key)
        parameters = self.model.trainable_parameters()
        sums = self._threaded_gradients([(parameters, shard) for shard in shards])
        loss, gradients = sums[0] if len(sums) == 1 else tree_map(mx.add, *sums)
        return loss, gradients, float(sum(map(len, shards)))

    def _add_gradients(
        self,
        parameters: dict,
        batch: Batch,
        key: mx.array,
        total: tuple[mx.array, Arrays] | None,
    ) -> tuple[mx.array, Arrays]:
        """Mean loss of a batch [B, T] and its gradients, added to `total` if given."""

        def mean_loss(parameters: dict) -> mx.array:
            self.model.update(tree_map(lambda p: p.astype(self.dtype), parameters))
            return self._mean_loss(batch, key)

        with swapped_parameters(self.model):
            loss, tree = mx.value_and_grad(mean_loss)(parameters)
        gradients = flatten_params(tree)
        if total is None:
            return loss, gradients
        return total[0] + loss, {n: total[1][n] + g for n, g in gradients.items()}

    def _mean_loss(self, batch: Batch, key: mx.array) -> mx.array:
        """Mean weighted loss of the tokens of a batch [B, T], or DPO's of its pairs."""
        if batch.reference is None:
            losses = training_losses(self.model, batch.inputs, batch.targets, key)
            return (losses if batch.weights is None else losses * batch.weights).mean()
        # [B, 2 T] -> [2 B, T]: each answer in a row of its own
        inputs, targets, mask = (
            array.reshape(2 * len(array), -1)
            for array in (batch.inputs, batch.targets, batch.weights)
        )
        losses = training_losses(self.model, inputs, targets, key)
        logprobs = answer_logprobs(losses, mask).reshape(batch.reference.shape)
        return dpo_losses(logprobs, batch.reference, self.config.train.beta).mean()

    def _compute_norm_and_scale(
        self, loss: mx.array, gradients: Arrays, part_count: mx.array, loss_limit: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """From sums over parts: mean loss, global norm of the mean gradient, factor that turns the
        summed into the clipped mean gradient, and whether to apply the step.
        """
        loss = loss / part_count
        # Row by row: on a CPU, MLX adds the values of an array one by one (its issues 488 and 4379)
        # and the sum of a large matrix is too small by up to several percent.
        row_sums = (mx.square(g).sum(axis=-1) for g in gradients.values())
        squares = sum((rows.sum() for rows in row_sums), mx.array(0.0))
        grad_norm = mx.sqrt(squares) / part_count
        scale = mx.minimum(self._grad_clip / (grad_norm + 1e-6), 1.0) / part_count
        should_apply = mx.isfinite(loss) & mx.isfinite(grad_norm) & (loss <= loss_limit)
        return loss, grad_norm, scale, should_apply


class _GradientAccumulator:
    """Accumulates the gradients of a thread's micro-batches. Starts the next one before waiting for
    the current sum, but only one, since each takes much more memory than the sum.
    """

    def __init__(self, add_gradients: Callable) -> None:
        self._add_gradients = add_gradients

    def __call__(self, parameters: dict, shard: Shard) -> tuple[mx.array, Arrays]:
        first, *rest = shard
        total = self._add_gradients(parameters, *first, None)
        for micro_batch in rest:
            mx.async_eval(total)
            next_total = self._add_gradients(parameters, *micro_batch, total)
            mx.eval(total)
            total = next_total
        return total


def make_train_step(
    config: Config,
    group: ProcessGroup = LOCAL_GROUP,
    init_weights: InitWeights | None = None,
    *,
    compiled: bool = True,
) -> TrainStep:
    """Training step with a new model; the config's vocabulary size and dtype must be resolved.

    Args:
        init_weights: weights to initialize from; default: random ones.
    """
    t = config.train
    model = GPT(config.model, t.seed, gradient_checkpointing=t.gradient_checkpointing)
    if init_weights:
        load_parameters(model, init_weights.parameters)
    if config.lora.lora_rank:
        # Frozen weights are converted once; trained ones stay float32.
        dtype = getattr(mx, t.dtype)
        model.update(tree_map(lambda p: p.astype(dtype), model.parameters()))
        new_tokens = init_weights.new_tokens if init_weights else range(0)
        add_lora(model, config.lora, seed=t.seed, new_tokens=new_tokens)
        mx.eval(model.parameters())  # frozen weights are constants in the traces of all threads
    return TrainStep(model, config, group, compiled=compiled)


class StepInputs:
    """Batch, learning rate and dropout key of a step, as a pure function of the step number.

    Args:
        tokens: training tokens or examples.
        group: each rank gets its rows of the batch, and its own dropout key.
    """

    def __init__(self, tokens: SplitArray, config: Config, group: ProcessGroup) -> None:
        self._tokens, self._config, self._rank, self._size = tokens, config, group.rank, group.size
        self._learning_rate = learning_rate_schedule(config)

    def __call__(self, step: int, batch_offset: int = 0) -> tuple[Batch, mx.array, mx.array]:
        """Batch, learning rate and dropout key of a step (from 0).

        Args:
            batch_offset: batches skipped by rollbacks.
        """
        t = self._config.train
        batch = self._tokens.get_batch(
            step + batch_offset,
            seed=t.seed,
            batch_size=t.batch_size,
            block_size=self._config.model.block_size,
            micro_batches=t.gradient_accumulation_steps,
        )
        arrays = (
            None if array is None else mx.array(select_rank_rows(array, self._rank, self._size))
            for array in batch
        )
        seed = derive_seed(t.seed, "dropout", step + batch_offset)
        key = mx.random.key(seed if self._size == 1 else derive_seed(seed, "rank", self._rank))
        return Batch(*arrays), self._learning_rate(step), key


def select_rank_rows(rows: np.ndarray, rank: int, size: int) -> np.ndarray:
    """A rank's rows of an array [A, B, T], as micro-batches of at most B rows: [A', B', T].

    Raises:
        UserError: if the rows cannot be divided evenly among the ranks.
    """
    A, B, T = rows.shape
    check_divisible(A * B, size)
    count = A * B // size
    batch_size = next(n for n in range(min(B, count), 0, -1) if count % n == 0)
    rank_rows = rows.reshape(A * B, T)[rank * count : (rank + 1) * count]
    return rank_rows.reshape(-1, batch_size, T)


def check_divisible(rows: int, size: int) -> None:
    """Check that the rows of a batch can be divided evenly among the ranks.

    Raises:
        UserError: with the nearest batch sizes that can.
    """
    if rows % size == 0:
        return
    nearest_sizes = [n for n in (rows // size * size, (rows // size + 1) * size) if n]
    raise UserError(
        f"{rows} sequences per step cannot be split evenly across {size} ranks",
        f"use --batch-size {' or '.join(map(str, nearest_sizes))} --gradient-accumulation-steps 1, "
        "or a different number of ranks.",
    )


def take_steps(
    step_function: TrainStep,
    tokens: SplitArray,
    config: Config,
    steps: int,
    start: int = 0,
) -> None:
    """Take some steps, for timing. The host is at most one step ahead, as in training."""
    step_inputs = StepInputs(tokens, config, step_function.group)
    previous = None
    for step in range(start, start + steps):
        outputs = step_function(*step_inputs(step))
        mx.async_eval(outputs, step_function.state)
        if previous is not None:
            mx.eval(previous)
        previous = outputs
    mx.eval(step_function.state)
