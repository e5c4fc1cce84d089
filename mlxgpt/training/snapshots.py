"""Snapshots of the weights after 0, 100, 200, 400, … steps, to see how a model learned.

They are in a run's `snapshots`, in 16 bits and without the optimizer: training cannot resume from
them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable

import mlx.core as mx

from mlxgpt.model.stats import count_parameters
from mlxgpt.storage.run import Run
from mlxgpt.training.step import TrainStep
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

FIRST = 100  # steps; each of the later ones is twice the one before
BYTES = 2  # of a weight
SHARE = 0.1  # of the disk's free space, at most, for all snapshots of a run


def is_snapshot_step(step: int) -> bool:
    """Whether a snapshot is taken after `step` updates."""
    doublings, rest = divmod(step, FIRST)
    return rest == 0 and doublings & (doublings - 1) == 0


class Snapshots:
    """Takes the snapshots of a run; if one cannot be written, training continues without.

    Args:
        submit: has something written in a thread.

    Attributes:
        on: whether any are taken.
    """

    def __init__(
        self,
        run: Run,
        step_function: TrainStep,
        submit: Callable[[Callable[[], None]], None],
    ) -> None:
        self._run, self._step_function = run, step_function
        self._submit = submit
        config = run.config
        self.on = config.train.snapshots
        ages = sum(map(is_snapshot_step, range(0, config.train.max_steps + 1, FIRST)))
        size = ages * count_parameters(config.model) * BYTES
        free = shutil.disk_usage(run.folder).free
        if self.on and size > SHARE * free:
            self.on = False
            logger.info(
                f"no snapshots during training: {size / 1e6:,.0f} MB are more than a tenth of "
                f"the disk's free {free / 1e6:,.0f} MB"
            )
        if self.on:
            run.snapshots.mkdir(exist_ok=True)

    def take(self, step: int) -> None:
        """Start to write the weights as they are, unless none are taken."""
        if not self.on:
            return
        parameters, _ = self._step_function.arrays()
        small = {name: value.astype(mx.float16) for name, value in parameters.items()}
        mx.eval(small)  # a thread can only read what is computed

        def write() -> None:
            try:
                self._run.save(self._run.snapshots, step, small, {})
            except (UserError, OSError) as error:
                self.on = False
                logger.info(f"no more snapshots: {getattr(error, 'problem', error)}")

        self._submit(write)
