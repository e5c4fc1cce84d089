"""Guards against loss spikes: which steps are skipped, when to roll back, when to give up.

A step whose loss or gradient is not finite changes nothing: the device itself skips it, so that the
host need not wait for its numbers. A loss spike, far above the losses before it, can be skipped in
the same way, or answered by rolling back to the newest checkpoint and skipping the batches that led
to it (as PaLM's training did; Chowdhery et al., 2022, section 5.1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxgpt.utils.errors import UserError

LOSS_WINDOW = 100  # steps that a loss is compared with
MIN_LOSSES = 25  # a loss is not compared with fewer
SPIKE_THRESHOLD = 6.0  # standard deviations above the mean loss
MIN_DEVIATION = 0.01  # nats, if the losses hardly differ
MAX_CONSECUTIVE_SKIPS = 10  # then training is given up
MAX_ROLLBACKS = 5  # after more, training is given up
# Name in checkpoints: attribute.
CHECKPOINT_FIELDS = {
    "losses": "losses",
    "skipped": "skipped",
    "in_a_row": "consecutive_skips",
    "returns": "rollbacks",
    "passed": "batch_offset",
}


@dataclass
class SpikeGuard:
    """Decides which steps, counted from 0, are skipped, and when to roll back or give up. It is
    stored in checkpoints.

    Attributes:
        on_spike: `ignore`, `skip` or `rollback`.
        losses: (step, loss) of the last steps that were applied.
        skipped: steps that were not applied, in all.
        consecutive_skips: those since the last step that was applied.
        rollbacks: how often training was rolled back.
        batch_offset: batches skipped by that: step n takes batch n + batch_offset.
        spike_step: the step whose loss asks for a rollback, or None.
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
        """Whether further training is of no use."""
        return self.consecutive_skips >= MAX_CONSECUTIVE_SKIPS or self.rollbacks > MAX_ROLLBACKS

    @property
    def must_stop(self) -> bool:
        """Whether the next step must not be taken before something else is done."""
        return self.has_diverged or self.spike_step is not None

    def loss_limit(self, step: int) -> float:
        """The largest loss with which a step is applied.

        It depends on the steps up to the last but one, since the last one is still being computed
        when this one is handed over; and on no other, however much of it is known already.
        """
        if self.on_spike == "ignore":
            return math.inf
        recent_losses = [loss for n, loss in self.losses if n < step - 1][-LOSS_WINDOW:]
        if len(recent_losses) < MIN_LOSSES:
            return math.inf
        deviation = max(statistics.pstdev(recent_losses), MIN_DEVIATION)
        # As the device compares it.
        return float(np.float32(statistics.fmean(recent_losses) + SPIKE_THRESHOLD * deviation))

    def record(self, step: int, loss: float, grad_norm: float, loss_limit: float) -> None:
        """Record a step that was computed; it was applied if its loss was at most `loss_limit`."""
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
        """Skip the spike: there is no checkpoint to roll back to."""
        self.spike_step = None

    def roll_back(self, start: int, tree: Mapping[str, Any]) -> None:
        """Continue from step `start`, with what a guard remembered there, and with the batches
        after the spike's.
        """
        assert self.spike_step is not None
        self.batch_offset += self.spike_step + 1 - start
        self.rollbacks += 1
        self.losses = SpikeGuard.from_tree(tree).losses
        self.consecutive_skips = 0
        self.spike_step = None

    def to_tree(self) -> dict[str, Any]:
        """What a checkpoint stores of the guard."""
        return {name: getattr(self, attribute) for name, attribute in CHECKPOINT_FIELDS.items()}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], on_spike: str = "ignore") -> SpikeGuard:
        """The guard of a checkpoint; a fresh one if the tree is empty, as in format 1.

        Raises:
            UserError: if it is not what `to_tree` makes.
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
