"""Which rows of a step's batch are a rank's, and with which keys their dropout is drawn.

A step cuts its batch into parts, one after the other or in lanes, each with a dropout key of its
own (step.py). A rank has as many rows as any other, one after the other, in pieces of equal size,
none of which reaches over the end of a part: so that a row gets the same mask, whoever computes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlxgpt.backend import execution
from mlxgpt.config import Config
from mlxgpt.errors import UserError


@dataclass(frozen=True)
class Parts:
    """How one machine cuts the micro-batches, A of B rows each, of its batch.

    Attributes:
        lanes: L threads, each with an equal share of the parts, in this order.
        each: parts that a lane cuts its rows of one micro-batch into.
        rows: of a part.
        count: of all parts; part n has the n-th key.
    """

    lanes: int
    each: int
    rows: int
    count: int

    @classmethod
    def of(cls, A: int, B: int, T: int) -> Parts:
        """Each lane has half of each micro-batch, in portions; or, of an odd one, half of the
        micro-batches, or one lane has all.
        """
        L = execution.thread_count()
        if B % L == 0:
            each = execution.portions(B, T)
            return cls(L, each, B // L // each, A * L * each)
        return cls(L if A % L == 0 else 1, 1, B, A)

    def number(self, micro_batch: int, row: int, A: int) -> int:
        """The part that has a row of a micro-batch."""
        part = row // self.rows
        if self.count == A:
            return micro_batch
        lane, place = divmod(part, self.each)
        return (lane * A + micro_batch) * self.each + place


@dataclass(frozen=True)
class Share:
    """One rank's rows of a batch.

    Attributes:
        first: the first of its rows, those of all micro-batches counted on.
        pieces: for each, its part's number, and its first row there.
        rows: of a piece.
        of: rows of a part.
        lanes: threads that have an equal number of the pieces each.
    """

    first: int
    pieces: tuple[tuple[int, int], ...]
    rows: int
    of: int
    lanes: int

    @property
    def whole(self) -> bool:
        """Whether each piece is a part."""
        return self.rows == self.of


def share(A: int, B: int, T: int, rank: int, size: int) -> Share:
    """What is a rank's of a batch of A micro-batches of B rows of T tokens, among `size` ranks.

    Raises:
        UserError: if the rows cannot be shared out evenly.
    """
    must_divide(A * B, size)
    parts = Parts.of(A, B, T)
    count = A * B // size
    rows = math.gcd(parts.rows, count)
    used = execution.thread_count()
    if count // rows % used:  # a lane more than there are pieces for
        if rows % used == 0:
            rows //= used
        else:
            used = 1
    first = rank * count
    pieces = []
    for row in range(first, first + count, rows):
        micro_batch, within = divmod(row, B)
        pieces.append((parts.number(micro_batch, within, A), within % parts.rows))
    return Share(first, tuple(pieces), rows, parts.rows, used)


def must_divide(rows: int, size: int) -> None:
    """Refuse a batch whose rows cannot be shared out evenly.

    Raises:
        UserError: naming the nearest ones that can.
    """
    if rows % size == 0:
        return
    near = [n for n in (rows // size * size, (rows // size + 1) * size) if n]
    raise UserError(
        f"a batch of {rows} sequences cannot be shared out evenly among {size} machines",
        f"use --batch-size {' or '.join(map(str, near))} --gradient-accumulation-steps 1, or "
        "another number of machines.",
    )


def shared(config: Config, size: int) -> str:
    """In words, how a config's batch is shared out."""
    rows = config.sequences_per_step
    return f"{rows // size} of {rows} sequences each"
