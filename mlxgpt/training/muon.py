"""Muon (Jordan et al., 2024): momentum whose every direction is made equally long.

The update of a matrix is its momentum with all singular values brought near 1, by a few
Newton-Schulz steps, so that rare directions are learned as quickly as common ones.

Then each neuron's row is divided by its own running size, and the whole made as long as it was
(NorMuon, Li et al., 2025), so that no neuron moves more than the others for long.

Unlike `mlx.optimizers.Muon` its weight decay is decoupled, matrices of one shape are done in one
batch, and queries, keys and values, which are one matrix in GPT-2, are three here.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_unflatten

from mlxgpt.model.gpt import flat

# The quintic of Jordan's Muon, steepest at 0: after five steps singular values lie in 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-12
ROW_MOMENTUM = 0.95  # of the running mean square of a row


class Muon(Optimizer):
    """Updates matrices[out, in]; for all else use another one.

    Args:
        momentum: of the gradient's running mean, with Nesterov's look ahead.
        weight_decay: of each matrix, times the learning rate.
    """

    def __init__(self, momentum: float, weight_decay: float) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", 0.0)
        self.momentum, self.weight_decay = momentum, weight_decay

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Begin with no momentum."""
        state["v"] = mx.zeros_like(parameter)
        state["rows"] = mx.zeros((len(parameter), 1), parameter.dtype)

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """The parameters after a step, of those that have gradients."""
        if not self._initialized:
            self.init(gradients)
        self.state["step"] = self.step + 1
        rate = self.learning_rate
        own = flat(parameters)
        updates: dict[str, mx.array] = {}
        for name, gradient in flat(gradients).items():
            state = _at(self.state, name)
            state["v"] = self.momentum * state["v"] + (1 - self.momentum) * gradient
            updates[name] = self.momentum * state["v"] + (1 - self.momentum) * gradient
        steps = _orthogonal(updates)
        for name, step in steps.items():
            state = _at(self.state, name)
            size = mx.square(step).mean(axis=1, keepdims=True)
            state["rows"] = ROW_MOMENTUM * state["rows"] + (1 - ROW_MOMENTUM) * size
            even = mx.rsqrt(state["rows"] + EPS)
            # What the rows' sizes add up to before, and will after.
            steps[name] = step * (even * mx.sqrt(size.sum() / ((size * even * even).sum() + EPS)))
        return tree_unflatten(
            {
                name: own[name] * (1 - rate * self.weight_decay) - rate * step
                for name, step in steps.items()
            }
        )


def orthogonalised(x: mx.array) -> mx.array:
    """x[n, rows, columns], rows ≤ columns, with all singular values near 1."""
    a, b, c = QUINTIC
    rows, columns = x.shape[1:]
    x = x / (mx.sqrt(mx.square(x).sum(axis=(1, 2), keepdims=True)) + 1e-7)
    if columns < 2 * rows:
        for _ in range(STEPS):
            square = x @ x.swapaxes(1, 2)
            x = a * x + (b * square + c * square @ square) @ x
        return x
    # Each step is a product with a polynomial of x·xᵀ, and these commute: so the steps are taken on
    # that small square alone, and all of them multiply the long matrix once.
    square = x @ x.swapaxes(1, 2)
    one = mx.eye(rows)
    step = all_steps = a * one + b * square + c * square @ square
    for _ in range(STEPS - 1):
        square = square @ step @ step
        step = a * one + b * square + c * square @ square
        all_steps = step @ all_steps
    return all_steps @ x


def _orthogonal(updates: dict[str, mx.array]) -> dict[str, mx.array]:
    """Each matrix orthogonalised, and longer where it is taller than wide: by √(out / in)."""
    batches: dict[tuple[int, ...], list[tuple[str, int, mx.array]]] = defaultdict(list)
    for name, update in updates.items():
        parts = mx.split(update, 3) if name.endswith("c_attn.weight") else [update]
        for n, part in enumerate(parts):
            wide = part if part.shape[0] <= part.shape[1] else part.T
            batches[wide.shape].append((name, n, wide))
    done: dict[str, dict[int, mx.array]] = defaultdict(dict)
    for batch in batches.values():
        result = orthogonalised(mx.stack([wide for *_, wide in batch]))
        for row, (name, n, _) in zip(result, batch, strict=True):
            done[name][n] = row
    steps = {}
    for name, update in updates.items():
        rows, columns = update.shape
        parts = [done[name][n] for n in range(len(done[name]))]
        tall = rows // len(parts) > columns
        parts = [part.T if tall else part for part in parts]
        scale = max(1.0, rows / len(parts) / columns) ** 0.5
        steps[name] = scale * (mx.concatenate(parts) if len(parts) > 1 else parts[0])
    return steps


def _at(tree: Any, name: str) -> Any:
    """What lies at a dotted name."""
    for part in name.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree
