"""What every rank but the first does in a training: the same steps, and nothing beside them."""

from __future__ import annotations

from mlxgpt.config import Config
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.machine import compiler, device, mac
from mlxgpt.machine.ranks import Ranks
from mlxgpt.training import together
from mlxgpt.training.callback import Callback
from mlxgpt.training.forecast import Forecast
from mlxgpt.training.guard import Guard
from mlxgpt.training.session import stop_signals
from mlxgpt.training.step import new_step
from mlxgpt.training.trainer import Hook, train


def follow(
    ranks: Ranks, config: Config, dataset: Dataset, forecast: Forecast, limit: int | None
) -> tuple[int, int]:
    """Train with the first rank, from where it says, until all stop; the updates done, and planned.

    Args:
        config: of the first rank, but for how many steps it plans.
        limit: bytes; a training that takes more is stopped.
    """
    step_function = new_step(config, ranks=ranks)
    config, start, memory = together.told_to_begin(ranks, step_function)
    guard = Guard.of(memory, config.train.on_spike)
    over = False

    def stop() -> bool:
        nonlocal over
        over = limit is not None and device.memory()[0] > limit
        return ranks.stops(over or asked())

    def logged(step: int) -> bool:
        return step == config.train.max_steps or step % config.train.log_interval == 0

    # Where the first rank waits for the device, so does this one: all see a spike at one step.
    hooks = together.hooks(ranks, step_function, config, [Hook(logged, lambda metrics: None)])
    with (
        ranks.watched(forecast.step_seconds),
        stop_signals(Callback()) as asked,
        compiler.undisturbed(),
        mac.awake(),
    ):
        ranks.meet()
        step = start
        while True:
            step = train(
                step_function,
                dataset.train,
                config,
                start=step,
                hooks=hooks,
                stop=stop,
                guard=guard,
                can_go_back=ranks.spread,
            )
            if guard.gives_up or guard.spiked is None:
                break
            _, step, then = together.told_to_begin(ranks, step_function)
            guard.go_back(step, then)
        ranks.gather(over)
    return step, config.train.max_steps
