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
        seconds: wall time from when the first step was under way to when this one was, without
            the hooks that the device waited for. A step is under way when it was handed over and
            the one before is computed; so between two steps it is what the steps between took.
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
    """Something to do after the steps for which `due(step)` holds.

    Attributes:
        needs_state: whether it reads the model or the optimizer as they are after its step. The
            device then waits for it. Other hooks run once the next step was handed over, so that
            the device is never idle for them; where one that needs the state is due at the same
            step, all of them run before the next step, in order.
    """

    due: Callable[[int], bool]
    run: Callable[[Metrics], object]
    needs_state: bool = True


@dataclass(frozen=True)
class _Pending:
    """A step that was handed over: its numbers are not read yet, and its hooks have not run."""

    step: int  # from 0
    learning_rate: mx.array
    limit: float
    loss: mx.array
    norm: mx.array
    seconds: float  # as in Metrics
    hooks: list[Hook]  # those that are due

    @property
    def drains(self) -> bool:
        return any(hook.needs_state for hook in self.hooks)


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
    training was interrupted. A step's numbers are read, and it is logged, once the next step was
    handed over, so that the device always has work. The host waits for the device, before it hands
    over another step, only for hooks that need the state; it is never more than one step ahead.

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
    began = paused = 0.0
    upcoming = batch(start)
    pending: _Pending | None = None

    def settle() -> None:
        """Wait for the pending step, show it to the guard and run its hooks."""
        nonlocal pending, paused
        if not pending:
            return
        done, pending = pending, None
        loss, norm = float(done.loss), float(done.norm)
        guard.settle(done.step, loss, norm, done.limit)
        if guard.spiked is not None and not can_go_back():
            guard.go_on()
        if guard.stops or not done.hooks:
            return
        metrics = Metrics(done.step + 1, float(done.learning_rate), loss, norm, done.seconds)
        if done.drains:
            mx.eval(step_function.state)
        since = time.monotonic()
        for hook in done.hooks:
            hook.run(metrics)
        if done.drains:
            paused += time.monotonic() - since

    for step in range(start, t.max_steps):
        rate = learning_rate(step)
        key = mx.random.key(derive(t.seed, "dropout", step + guard.passed))
        limit = guard.limit(step)
        loss, norm = step_function(*upcoming, rate, key, limit)
        mx.async_eval(loss, norm, step_function.state)
        if step + 1 < t.max_steps:
            upcoming = batch(step + 1)
        settle()  # the step before; the device is busy with this one
        now = time.monotonic()  # a clock that stands still while the machine sleeps
        if step == start:
            began = now
        due = [hook for hook in hooks if hook.due(step + 1)]
        pending = _Pending(step, rate, limit, loss, norm, now - began - paused, due)
        if pending.drains and not guard.stops:
            settle()
        if guard.stops or stop():
            break
    if not guard.stops:  # else what follows is not of this training
        settle()
    mx.eval(step_function.state)
    return step + 1
