"""Watches the numbers of a training: which steps are not applied, and when to give up.

A step whose loss or gradient is not finite changes nothing: the device itself leaves it out, so
that nobody has to wait for a number. A spike, a loss far above those before it, can be left out in
the same way, or answered by going back to the newest checkpoint and passing over the batches that
led to it (as PaLM's training did; Chowdhery et al., 2022, section 5.1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mlxgpt.errors import UserError

WINDOW = 100  # steps that a loss is compared with
FEWEST = 25  # of them
SPIKE = 6.0  # standard deviations above their mean
LEAST_DEVIATION = 0.01  # nats: where the losses hardly differ
IN_A_ROW = 10  # steps not applied, until it gives up
MOST_RETURNS = 5


@dataclass
class Guard:
    """What is remembered of a training's steps, counted from 0. It is part of a checkpoint.

    Attributes:
        on_spike: `ignore`, `skip` or `rollback`.
        losses: (step, loss) of the last steps that were applied.
        skipped: steps that were not applied, in all; in_a_row: since the last one that was.
        returns: how often the training went back.
        passed: batches passed over by that: step n takes batch n + passed.
        spiked: the step whose loss asks to go back; None for none.
    """

    on_spike: str = "ignore"
    losses: list[tuple[int, float]] = field(default_factory=list)
    skipped: int = 0
    in_a_row: int = 0
    returns: int = 0
    passed: int = 0
    spiked: int | None = None

    @property
    def gives_up(self) -> bool:
        """Whether going on is of no use."""
        return self.in_a_row >= IN_A_ROW or self.returns > MOST_RETURNS

    @property
    def stops(self) -> bool:
        """Whether the next step must not be taken before something else is done."""
        return self.gives_up or self.spiked is not None

    def limit(self, step: int) -> float:
        """The largest loss with which a step is applied.

        It hangs on the steps up to the last but one, since the last one is still being computed
        when this one is handed over; and on no other, however much of it is known already.
        """
        if self.on_spike == "ignore":
            return math.inf
        known = [loss for n, loss in self.losses if n < step - 1][-WINDOW:]
        if len(known) < FEWEST:
            return math.inf
        deviation = max(statistics.pstdev(known), LEAST_DEVIATION)
        # As the device compares it.
        return float(np.float32(statistics.fmean(known) + SPIKE * deviation))

    def settle(self, step: int, loss: float, norm: float, limit: float) -> None:
        """Take note of a step that was computed, with the loss that it was applied up to."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and loss <= limit:
            self.losses = [*self.losses[-WINDOW:], (step, loss)]
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        if finite and self.on_spike == "rollback":
            self.spiked = step

    def go_on(self) -> None:
        """Leave a spike out: there is nothing to go back to."""
        self.spiked = None

    def go_back(self, start: int, then: Mapping[str, Any]) -> None:
        """Go on from step `start`, with what a guard remembered `then`, and with the batches after
        the spike's.
        """
        assert self.spiked is not None
        self.passed += self.spiked + 1 - start
        self.returns += 1
        self.losses = Guard.of(then).losses
        self.in_a_row = 0
        self.spiked = None

    def to_tree(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        tree = asdict(self)
        del tree["on_spike"], tree["spiked"]
        return tree

    @classmethod
    def of(cls, tree: Mapping[str, Any], on_spike: str = "ignore") -> Guard:
        """The guard of a checkpoint; a fresh one of an empty tree, as in format 1.

        Raises:
            UserError: if it is not what `to_tree` makes.
        """
        if not tree:
            return cls(on_spike)
        guard = cls(on_spike)
        try:
            guard.losses = [(int(step), float(loss)) for step, loss in tree["losses"]]
            for name in ("skipped", "in_a_row", "returns", "passed"):
                if type(tree[name]) is not int or not 0 <= tree[name] < 1 << 53:
                    raise ValueError(name)
                setattr(guard, name, tree[name])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"the checkpoint's guard is damaged: {error}", "use another checkpoint."
            ) from error
        return guard
