"""A model's weights at the ages of its training, to look back at: after 0, 100, 200, 400, … steps.

They lie in a run's `snapshots`, in 16 bits and without the optimizer: nothing is resumed from them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import mlx.core as mx

from mlxgpt.errors import UserError
from mlxgpt.model.counting import count_parameters
from mlxgpt.storage.run import Run
from mlxgpt.training.step import TrainStep

FIRST = 100  # steps; each age is twice the one before
BYTES = 2  # of a weight
SHARE = 0.1  # of the disk's free space, at most, for all of a training's


def is_age(step: int) -> bool:
    """Whether a snapshot is taken after so many steps."""
    doublings, rest = divmod(step, FIRST)
    return rest == 0 and doublings & (doublings - 1) == 0


class Snapshots:
    """Takes a training's snapshots; where one cannot be written the training goes on without.

    Args:
        beside: has something written beside the training.
        note: takes a line on why there are none.

    Attributes:
        on: whether any are taken.
    """

    def __init__(
        self,
        run: Run,
        step_function: TrainStep,
        beside: Callable[[Callable[[], None]], None],
        note: Callable[[str], None],
    ) -> None:
        self._run, self._step_function = run, step_function
        self._beside, self._note = beside, note
        config = run.config
        self.on = config.train.snapshots
        ages = sum(map(is_age, range(0, config.train.max_steps + 1, FIRST)))
        size = ages * count_parameters(config.model) * BYTES
        free = shutil.disk_usage(run.folder).free
        if self.on and size > SHARE * free:
            self.on = False
            note(
                f"no snapshots on the way: {size / 1e6:,.0f} MB are more than a tenth of "
                f"the disk's free {free / 1e6:,.0f} MB"
            )
        if self.on:
            run.snapshots.mkdir(exist_ok=True)

    def take(self, step: int) -> None:
        """Begin to write the weights as they are, unless none are taken."""
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
                self._note(f"no more snapshots: {getattr(error, 'problem', error)}")

        self._beside(write)
