"""What came of a comparison, as plain data: what is shown, written, and drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlxgpt.study.curves import Curve, SpeedUp
from mlxgpt.study.paired import Difference


@dataclass(frozen=True)
class Training:
    """One training of a variant.

    Attributes:
        key: its folder in runs/compare/trainings.
        bits_per_byte: at its end; infinite where it diverged.
        curve: on the text held back; None where it diverged.
    """

    seed: int
    key: str
    bits_per_byte: float
    curve: Curve | None


@dataclass
class Standing:
    """How a variant stands.

    Attributes:
        changes: the settings in which it differs from the first one: {name: (first's, its)}.
        parameters, steps, tokens: of each of its trainings.
        difference, speed_up_tokens, speed_up_seconds: from the first one; None of it itself.
        verdict: in a word or two; advice: what would tell more, if anything.
        closed: whether it gets no more seeds.
    """

    name: str
    changes: dict[str, tuple[Any, Any]]
    parameters: int
    steps: int
    tokens: int
    trainings: list[Training] = field(default_factory=list)
    difference: Difference | None = None
    speed_up_tokens: SpeedUp | None = None
    speed_up_seconds: SpeedUp | None = None
    verdict: str = ""
    advice: str = ""
    closed: bool = False

    @property
    def mean(self) -> float | None:
        """Bits per byte over its seeds."""
        values = [training.bits_per_byte for training in self.trainings]
        return sum(values) / len(values) if values else None

    @property
    def diverged(self) -> bool:
        return any(training.curve is None for training in self.trainings)


@dataclass
class Record:
    """One comparison.

    Attributes:
        name, budget: as they were given.
        data: the text, and how many bytes of it were held back.
        judged_on: `held back` or `validation`.
        level: how often an interval may miss: 0.05, or less where it is looked at often.
        sequential: whether seeds were added until it was decided.
        drift: the slowest and the fastest training's speed, beside the median of its variant's.
        looks, final_looks: see Ledger.
        interrupted: whether trainings are missing.
        machine: what it was trained on, and with.
    """

    name: str
    budget: str
    data: str
    held_back_bytes: int
    judged_on: str
    level: float
    sequential: bool
    machine: str
    variants: list[Standing]
    drift: tuple[float, float] | None = None
    looks: list[int] = field(default_factory=list)
    final_looks: int = 0
    interrupted: bool = False
