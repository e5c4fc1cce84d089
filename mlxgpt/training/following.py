"""What every rank but the first does in a training: the same steps, and its part of evaluations."""

from __future__ import annotations

from functools import partial

from mlxgpt.config import Config, from_tree
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.evaluation.loss import Evaluator
from mlxgpt.machine import compiler, device, mac
from mlxgpt.machine.ranks import Ranks
from mlxgpt.training import together
from mlxgpt.training.callback import Callback
from mlxgpt.training.evaluating import tokens_at_end, tokens_each
from mlxgpt.training.forecast import Forecast
from mlxgpt.training.guard import Guard
from mlxgpt.training.session import stop_signals
from mlxgpt.training.step import TrainStep, new_step
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
    told = together.told_to_begin(ranks, step_function)
    config = from_tree(told.config)
    guard = Guard.of(told.guard, config.train.on_spike)
    evaluation = _Evaluation(config, dataset, step_function, told.bos)
    over = False

    def stop() -> bool:
        nonlocal over
        over = limit is not None and device.memory()[0] > limit
        return ranks.stops(over or asked())

    def logged(step: int) -> bool:
        return step == config.train.max_steps or step % config.train.log_interval == 0

    # Where the first rank waits for the device, so does this one: all see a spike at one step.
    own = [Hook(evaluation.due, lambda at: evaluation(at.step)), Hook(logged, lambda at: None)]
    hooks = together.hooks(ranks, step_function, config, own)
    with (
        ranks.watched(forecast.step_seconds),
        stop_signals(Callback()) as asked,
        compiler.undisturbed(),
        mac.awake(),
    ):
        if told.missing and evaluation.due(told.start):
            evaluation(told.start)
        ranks.meet()
        step = told.start
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
            told = together.told_to_begin(ranks, step_function)
            step = told.start
            guard.go_back(step, told.guard)
        ranks.gather(over)
    return step, config.train.max_steps


class _Evaluation:
    """This rank's part of the evaluations that the first one asks for."""

    def __init__(
        self, config: Config, dataset: Dataset, step_function: TrainStep, bos: int | None
    ) -> None:
        self._train = config.train
        self._evaluator = partial(
            Evaluator,
            step_function.model,
            dataset.tokenizer,
            dataset.val,
            bos=bos,
            batch_size=config.train.batch_size,
            dtype=step_function.dtype,
            ranks=step_function.ranks,
        )
        there = len(dataset.val.ids)
        self._each, self._at_end = tokens_each(config, there), tokens_at_end(config, there)
        self._evaluate = self._evaluator(limit=self._each)

    def due(self, step: int) -> bool:
        return step == self._train.max_steps or step % self._train.eval_interval == 0

    def __call__(self, step: int) -> None:
        self._evaluate()
        if step == self._train.max_steps and self._at_end > self._each:
            self._evaluator(limit=self._at_end)()
