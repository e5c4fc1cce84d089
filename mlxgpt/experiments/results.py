"""What came of a comparison, as plain data: what is shown, written, and drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mlxgpt.experiments.curves import Curve, SpeedUp
from mlxgpt.experiments.statistics import Difference
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError


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
class VariantResult:
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
    variants: list[VariantResult]
    drift: tuple[float, float] | None = None
    looks: list[int] = field(default_factory=list)
    final_looks: int = 0
    interrupted: bool = False


def from_json(text: str) -> Record:
    """A record from its file's text.

    Raises:
        UserError: if it is none.
    """
    try:
        tree = files.parse_json(text)
        drift = tree["drift"]
        return Record(
            **{
                name: str(tree[name]) for name in ("name", "budget", "data", "judged_on", "machine")
            },
            held_back_bytes=int(tree["held_back_bytes"]),
            level=float(tree["level"]),
            sequential=bool(tree["sequential"]),
            variants=[_variant_result(one) for one in tree["variants"]],
            drift=(float(drift[0]), float(drift[1])) if drift else None,
            looks=[int(seeds) for seeds in tree["looks"]],
            final_looks=int(tree["final_looks"]),
            interrupted=bool(tree["interrupted"]),
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            "this is no comparison's result, or a damaged one",
            "give the JSON file that `mlxgpt compare` wrote, in runs/compare.",
        ) from error


def _variant_result(tree: dict[str, Any]) -> VariantResult:
    difference, trainings = tree["difference"], tree["trainings"]
    return VariantResult(
        name=str(tree["name"]),
        changes={str(name): (old, new) for name, (old, new) in tree["changes"].items()},
        parameters=int(tree["parameters"]),
        steps=int(tree["steps"]),
        tokens=int(tree["tokens"]),
        trainings=[
            Training(int(t["seed"]), str(t["key"]), _number(t["bits_per_byte"]), _curve(t["curve"]))
            for t in trainings
        ],
        difference=_difference(difference) if difference else None,
        speed_up_tokens=_speed_up(tree["speed_up_tokens"]),
        speed_up_seconds=_speed_up(tree["speed_up_seconds"]),
        verdict=str(tree["verdict"]),
        advice=str(tree["advice"]),
        closed=bool(tree["closed"]),
    )


def _curve(tree: dict[str, Any] | None) -> Curve | None:
    if tree is None:
        return None
    columns = [tree[name] for name in ("steps", "tokens", "seconds", "bits_per_byte")]
    if len(set(map(len, columns))) != 1 or not columns[0]:
        raise ValueError("a curve's columns are not equally long")
    steps, tokens, seconds, bits = columns
    return Curve(
        [int(n) for n in steps],
        [int(n) for n in tokens],
        [float(s) for s in seconds],
        [_number(b) for b in bits],
        _number(tree["tokens_per_second"]),
    )


def _difference(tree: dict[str, Any]) -> Difference:
    low, high, p, more = (tree[name] for name in ("low", "high", "p", "more"))
    return Difference(
        float(tree["mean"]),
        _optional(low),
        _optional(high),
        _optional(p),
        None if more is None else int(more),
    )


def _speed_up(tree: dict[str, Any] | None) -> SpeedUp | None:
    if tree is None:
        return None
    return SpeedUp(float(tree["ratio"]), _optional(tree["low"]), _optional(tree["high"]))


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _number(value: Any) -> float:
    """As it was before JSON, which has no infinity."""
    return math.inf if value is None else float(value)
