"""What every rank but the first does in a training: the same steps, and its part of evaluations."""

from __future__ import annotations

from mlxgpt.backend.cpu import jit as compiler
from mlxgpt.config import Config, from_tree
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.distributed.group import ProcessGroup
from mlxgpt.machine import mac
from mlxgpt.training import together
from mlxgpt.training.callback import Callback
from mlxgpt.training.evaluating import Evaluations
from mlxgpt.training.forecast import Forecast
from mlxgpt.training.guard import Guard
from mlxgpt.training.hooks import every
from mlxgpt.training.session import stop_signals, train_through
from mlxgpt.training.snapshots import is_age
from mlxgpt.training.step import new_step
from mlxgpt.training.trainer import Hook


def follow(
    group: ProcessGroup, config: Config, dataset: Dataset, forecast: Forecast, limit: int | None
) -> tuple[int, int]:
    """Train with the first rank, from where it says, until all stop; the updates done, and planned.

    Args:
        config: of the first rank, but for how many steps it plans.
        limit: bytes; a training that takes more is stopped.
    """
    step_function = new_step(config, group=group)
    told = together.told_to_begin(group, step_function)
    config = from_tree(told.config)
    guard = Guard.of(told.guard, config.train.on_spike)
    evaluate = Evaluations(config, dataset, step_function, told.bos)

    def go_back() -> int:
        told = together.told_to_begin(group, step_function)
        guard.go_back(told.start, told.guard)
        return told.start

    evaluated = every(config, config.train.eval_interval)
    # Where the first rank waits for the device, so does this one: all see a spike at one step.
    own = [Hook(evaluated, lambda at: evaluate(at.step)), Hook(is_age, lambda at: None)]
    with (
        group.watch(forecast.step_seconds),
        stop_signals(Callback()) as asked,
        compiler.undisturbed(),
        mac.awake(),
    ):
        if told.missing and evaluated(told.start):
            evaluate(told.start)
        group.barrier("before the first step")
        step, over = train_through(
            step_function,
            dataset,
            config,
            guard,
            start=told.start,
            hooks=own,
            wish=asked,
            limit=limit,
            group=group,
            can_go_back=lambda: group.broadcast("can go back"),
            go_back=go_back,
        )
        group.gather("over the memory limit", over)
    return step, config.train.max_steps
