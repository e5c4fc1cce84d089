"""The loop around the training step. It calls hooks, and knows neither display, files nor
evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlxgpt.config import Config
from mlxgpt.corpus.tokens import Tokens
from mlxgpt.seeds import derive
from mlxgpt.training.guard import Guard
from mlxgpt.training.schedule import learning_rate_schedule
from mlxgpt.training.step import TrainStep


@dataclass
class Metrics:
    """What is known after a step, and what hooks add to it for the hooks after them.

    Attributes:
        step: updates done, from 1.
        lr: learning rate of this step.
        loss: mean training loss of this step's batch, nats per token, before its update.
        grad_norm: the gradient's global norm before clipping.
        seconds: time spent in training so far, without the hooks' own.
        values: what hooks have added.
    """

    step: int
    lr: float
    loss: float
    grad_norm: float
    seconds: float
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Hook:
    """Something to do after the steps for which `due(step)` holds."""

    due: Callable[[int], bool]
    run: Callable[[Metrics], object]


def train(
    step_function: TrainStep,
    tokens: Tokens,
    config: Config,
    *,
    start: int = 0,
    hooks: Sequence[Hook] = (),
    stop: Callable[[], bool] = lambda: False,
    guard: Guard | None = None,
    can_go_back: Callable[[], bool] = lambda: False,
) -> int:
    """Take the steps from `start` on, up to `max_steps`, or until the guard stops it.

    Everything random is a function of (seed, purpose, step), so it does not matter where a
    training was interrupted. The next batch is built, and the next step handed over, while the
    device works; it is waited for when a hook is due, and never more than one step behind.

    Args:
        start: updates done already.
        hooks: called in order.
        stop: asked after each step; True ends the training there.
        guard: decides which steps are not applied; default: those that are not finite.
        can_go_back: asked at a spike; False leaves it out.

    Returns:
        Updates done in all.
    """
    t = config.train
    guard = guard or Guard()
    learning_rate = learning_rate_schedule(config)

    def batch(step: int) -> tuple[mx.array, mx.array]:
        inputs, targets = tokens.batch(
            step + guard.passed,
            seed=t.seed,
            batch_size=t.batch_size,
            block_size=config.model.block_size,
            micro_batches=t.gradient_accumulation_steps,
        )
        return mx.array(inputs), mx.array(targets)

    if start >= t.max_steps:
        return start
    seconds, since = 0.0, time.monotonic()  # a clock that stands still while the machine sleeps
    upcoming = batch(start)
    waiting: tuple[int, mx.array, mx.array, float] | None = None

    def settle() -> None:
        nonlocal waiting
        if waiting:
            number, loss, norm, limit = waiting
            guard.settle(number, float(loss), float(norm), limit)
        waiting = None
        if guard.spiked is not None and not can_go_back():
            guard.go_on()

    for step in range(start, t.max_steps):
        rate = learning_rate(step)
        key = mx.random.key(derive(t.seed, "dropout", step + guard.passed))
        limit = guard.limit(step)
        loss, norm = step_function(*upcoming, rate, key, limit)
        mx.async_eval(loss, norm, step_function.state)
        if step + 1 < t.max_steps:
            upcoming = batch(step + 1)
        settle()
        waiting = step, loss, norm, limit
        done = step + 1
        due = [hook for hook in hooks if hook.due(done)]
        if due:
            settle()
        if guard.stops:
            mx.eval(step_function.state)
            return done
        if due:
            mx.eval(step_function.state)
            seconds += time.monotonic() - since
            metrics = Metrics(done, float(rate), float(loss), float(norm), seconds)
            for hook in due:
                hook.run(metrics)
            since = time.monotonic()
        if stop():
            mx.eval(step_function.state)
            settle()
            return done
    settle()
    return t.max_steps
