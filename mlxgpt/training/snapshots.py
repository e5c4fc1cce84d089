"""Snapshots of the weights after 0, 100, 200, 400, … steps, to see how a model learned.

They are saved in the run's `snapshots` folder as float16 and without optimizer state, so training
cannot resume from them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable

import mlx.core as mx

from mlxgpt.model.stats import count_trained_parameters
from mlxgpt.storage.run import Run
from mlxgpt.training.step import TrainStep
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

FIRST_SNAPSHOT_STEP = 100  # each later snapshot is at twice the step of the previous one


def is_snapshot_step(step: int) -> bool:
    """Whether a snapshot is taken after `step` steps."""
    multiple, remainder = divmod(step, FIRST_SNAPSHOT_STEP)
    return remainder == 0 and multiple & (multiple - 1) == 0


BYTES_PER_WEIGHT = 2  # float16
MAX_DISK_SHARE = 0.1  # fraction of the free disk space, for all snapshots of a run


class SnapshotWriter:
    """Writes the snapshots of a run; if one cannot be written, training continues without them.

    Args:
        submit: runs a function in the writer thread.

    Attributes:
        enabled: whether snapshots are written.
    """

    def __init__(
        self,
        run: Run,
        step_function: TrainStep,
        submit: Callable[[Callable[[], None]], None],
    ) -> None:
        self._run, self._step_function = run, step_function
        self._submit = submit
        t = run.config.train
        self.enabled = t.snapshots
        count = sum(map(is_snapshot_step, range(0, t.max_steps + 1, FIRST_SNAPSHOT_STEP)))
        size = count * count_trained_parameters(run.config) * BYTES_PER_WEIGHT
        free = shutil.disk_usage(run.folder).free
        if self.enabled and size > MAX_DISK_SHARE * free:
            self.enabled = False
            logger.info(
                f"snapshots disabled: they would take {size / 1e6:,.0f} MB, more than 10% of the "
                f"{free / 1e6:,.0f} MB of free disk space"
            )
        if self.enabled:
            run.snapshots.mkdir(exist_ok=True)

    def take(self, step: int) -> None:
        """Start writing a snapshot of the current weights, if enabled."""
        if not self.enabled:
            return
        parameters, _ = self._step_function.state_dicts()
        weights = {name: value.astype(mx.float16) for name, value in parameters.items()}
        mx.eval(weights)  # the thread needs evaluated arrays

        def write() -> None:
            try:
                self._run.save(self._run.snapshots, step, weights, {})
            except (UserError, OSError) as error:
                self.enabled = False
                logger.info(f"snapshots disabled: {getattr(error, 'problem', error)}")

        self._submit(write)
