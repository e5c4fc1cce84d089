"""Guard against loss spikes: decides when to skip a step, roll back, or stop training.

A step with a non-finite loss or gradient is skipped on the device, so that the host does not have
to wait for the values. A loss spike, far above the recent losses, can be skipped in the same way,
or handled by rolling back to the newest checkpoint and skipping the batches that led to it, as in
the training of PaLM (Chowdhery et al., 2022, section 5.1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxgpt.utils.errors import UserError

LOSS_WINDOW = 100  # number of recent losses that a loss is compared with
MIN_LOSSES = 25  # with fewer recent losses, there is no limit
SPIKE_THRESHOLD = 6.0  # standard deviations above the mean of the recent losses
MIN_DEVIATION = 0.01  # nats, lower bound of the standard deviation
MAX_CONSECUTIVE_SKIPS = 10  # training stops at this number
MAX_ROLLBACKS = 5  # training stops above this number
# Name in checkpoints -> attribute.
CHECKPOINT_FIELDS = {
    "losses": "losses",
    "skipped": "skipped",
    "in_a_row": "consecutive_skips",
    "returns": "rollbacks",
    "passed": "batch_offset",
}


@dataclass
class SpikeGuard:
    """Decides which steps are skipped, and when to roll back or stop. Its state is stored in
    checkpoints. Steps are counted from 0.

    Attributes:
        on_spike: `ignore`, `skip` or `rollback`.
        losses: (step, loss) of the latest applied steps.
        skipped: total number of skipped steps.
        consecutive_skips: number of steps skipped since the last applied one.
        rollbacks: number of rollbacks.
        batch_offset: batches skipped by rollbacks; step n uses batch n + batch_offset.
        spike_step: step whose loss requires a rollback, or None.
    """

    on_spike: str = "ignore"
    losses: list[tuple[int, float]] = field(default_factory=list)
    skipped: int = 0
    consecutive_skips: int = 0
    rollbacks: int = 0
    batch_offset: int = 0
    spike_step: int | None = None

    @property
    def has_diverged(self) -> bool:
        """Whether training has diverged and must end."""
        return self.consecutive_skips >= MAX_CONSECUTIVE_SKIPS or self.rollbacks > MAX_ROLLBACKS

    @property
    def must_stop(self) -> bool:
        """Whether no further step may be taken: training has diverged, or must roll back first."""
        return self.has_diverged or self.spike_step is not None

    def loss_limit(self, step: int) -> float:
        """Largest loss for which a step is applied.

        It ignores the previous step, which is usually still being computed when this one starts,
        even where its loss is already known, so that results are reproducible.
        """
        if self.on_spike == "ignore":
            return math.inf
        recent_losses = [loss for n, loss in self.losses if n < step - 1][-LOSS_WINDOW:]
        if len(recent_losses) < MIN_LOSSES:
            return math.inf
        deviation = max(statistics.pstdev(recent_losses), MIN_DEVIATION)
        # Rounded to float32, in which the device compares it.
        return float(np.float32(statistics.fmean(recent_losses) + SPIKE_THRESHOLD * deviation))

    def record(self, step: int, loss: float, grad_norm: float, loss_limit: float) -> None:
        """Record the result of a step, which was applied if its loss was at most `loss_limit`."""
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if is_finite and loss <= loss_limit:
            self.losses = [*self.losses[-LOSS_WINDOW:], (step, loss)]
            self.consecutive_skips = 0
            return
        self.skipped += 1
        self.consecutive_skips += 1
        if is_finite and self.on_spike == "rollback":
            self.spike_step = step

    def skip_spike(self) -> None:
        """Cancel the rollback, for lack of a checkpoint: the spike's step is only skipped."""
        self.spike_step = None

    def roll_back(self, start: int, tree: Mapping[str, Any]) -> None:
        """Continue from step `start` with the losses in that checkpoint's `tree`, using the batches
        after the spike.
        """
        assert self.spike_step is not None
        self.batch_offset += self.spike_step + 1 - start
        self.rollbacks += 1
        self.losses = SpikeGuard.from_tree(tree).losses
        self.consecutive_skips = 0
        self.spike_step = None

    def to_tree(self) -> dict[str, Any]:
        """State of the guard for a checkpoint."""
        return {name: getattr(self, attribute) for name, attribute in CHECKPOINT_FIELDS.items()}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], on_spike: str = "ignore") -> SpikeGuard:
        """Restore the guard from a checkpoint; a new one if the tree is empty, as in format 1.

        Raises:
            UserError: if the tree is damaged.
        """
        guard = cls(on_spike)
        if not tree:
            return guard
        try:
            guard.losses = [(int(step), float(loss)) for step, loss in tree["losses"]]
            for name, attribute in [*CHECKPOINT_FIELDS.items()][1:]:
                if type(tree[name]) is not int or not 0 <= tree[name] < 1 << 53:
                    raise ValueError(name)
                setattr(guard, attribute, tree[name])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"the checkpoint's spike guard state is damaged: {error}", "use another checkpoint."
            ) from error
        return guard
