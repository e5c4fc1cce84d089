"""Results of a comparison as dataclasses, and parsing of their JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from mlxgpt.experiments.curves import LearningCurve, Speedup
from mlxgpt.experiments.statistics import PairedDifference
from mlxgpt.utils import json_files
from mlxgpt.utils.errors import UserError


@dataclass(frozen=True)
class RunResult:
    """Result of one run of a variant.

    Attributes:
        key: name of its folder in runs/compare/trainings.
        bits_per_byte: final value; infinite if the run diverged.
        curve: learning curve on the held-out data; None if the run diverged.
    """

    seed: int
    key: str
    bits_per_byte: float
    curve: LearningCurve | None


@dataclass
class VariantResult:
    """Results of a variant so far.

    Attributes:
        changes: settings that differ from the baseline: {name: (baseline's, variant's)}.
        parameters, steps, tokens: of each of its runs.
        difference, speed_up_tokens, speed_up_seconds: relative to the baseline; None for itself.
        verdict: one or two words; advice: what would confirm it, or empty.
        closed: whether it gets no more seeds.
    """

    name: str
    changes: dict[str, tuple[Any, Any]]
    parameters: int
    steps: int
    tokens: int
    trainings: list[RunResult] = field(default_factory=list)
    difference: PairedDifference | None = None
    speed_up_tokens: Speedup | None = None
    speed_up_seconds: Speedup | None = None
    verdict: str = ""
    advice: str = ""
    closed: bool = False

    @property
    def mean_bits_per_byte(self) -> float | None:
        """Mean over the seeds; None before the first run."""
        values = [run_result.bits_per_byte for run_result in self.trainings]
        return sum(values) / len(values) if values else None

    @property
    def diverged(self) -> bool:
        return any(run_result.curve is None for run_result in self.trainings)


@dataclass
class ComparisonRecord:
    """Record of one comparison.

    Attributes:
        name, budget: as passed by the user.
        data: name of the dataset; `held_back_bytes` of it are held out from training.
        judged_on: `held back` for the held-out data, or `validation`.
        level: significance level of each interval: 0.05, or less in sequential testing.
        sequential: whether seeds were added until a decision.
        drift: relative deviation of the slowest and fastest run from its variant's median speed.
        looks, final_looks: see Registry.
        interrupted: whether runs are missing.
        machine: device and MLX version.
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


RECORD_FORMAT = 1  # of comparisons and scaling studies; the first ones had no `format`


def record_to_tree(record: Any) -> dict[str, Any]:
    """A ComparisonRecord or a ScalingRecord as it is stored and printed."""
    return {"format": RECORD_FORMAT, **json_files.replace_nonfinite(asdict(record))}


def record_to_json(record: Any) -> str:
    """Format a ComparisonRecord or a ScalingRecord as JSON."""
    return json.dumps(record_to_tree(record), indent=1) + "\n"


def parse_comparison_record(text: str) -> ComparisonRecord:
    """Parse a record from JSON.

    Raises:
        UserError: if it is not a valid record, or in a newer format.
    """
    try:
        tree = json_files.parse_json(text)
        json_files.check_format(tree, RECORD_FORMAT, "this comparison")
        drift = tree["drift"]
        text_fields = ("name", "budget", "data", "judged_on", "machine")
        return ComparisonRecord(
            **{name: str(tree[name]) for name in text_fields},
            held_back_bytes=int(tree["held_back_bytes"]),
            level=float(tree["level"]),
            sequential=bool(tree["sequential"]),
            variants=[_parse_variant_result(variant) for variant in tree["variants"]],
            drift=(float(drift[0]), float(drift[1])) if drift else None,
            looks=[int(seeds) for seeds in tree["looks"]],
            final_looks=int(tree["final_looks"]),
            interrupted=bool(tree["interrupted"]),
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            "this is not a valid comparison result",
            "use the JSON file that `mlxgpt compare` wrote to runs/compare.",
        ) from error


def _parse_variant_result(tree: dict[str, Any]) -> VariantResult:
    difference = tree["difference"]
    return VariantResult(
        name=str(tree["name"]),
        changes={str(name): (old, new) for name, (old, new) in tree["changes"].items()},
        parameters=int(tree["parameters"]),
        steps=int(tree["steps"]),
        tokens=int(tree["tokens"]),
        trainings=[
            RunResult(
                int(run["seed"]),
                str(run["key"]),
                _parse_float_or_inf(run["bits_per_byte"]),
                _parse_curve(run["curve"]),
            )
            for run in tree["trainings"]
        ],
        difference=_parse_difference(difference) if difference else None,
        speed_up_tokens=_parse_speedup(tree["speed_up_tokens"]),
        speed_up_seconds=_parse_speedup(tree["speed_up_seconds"]),
        verdict=str(tree["verdict"]),
        advice=str(tree["advice"]),
        closed=bool(tree["closed"]),
    )


def _parse_curve(tree: dict[str, Any] | None) -> LearningCurve | None:
    if tree is None:
        return None
    columns = [tree[name] for name in ("steps", "tokens", "seconds", "bits_per_byte")]
    if len(set(map(len, columns))) != 1 or not columns[0]:
        raise ValueError("a curve's columns have different lengths")
    steps, tokens, seconds, losses = columns
    return LearningCurve(
        [int(n) for n in steps],
        [int(n) for n in tokens],
        [_parse_float_or_nan(value) for value in seconds],
        [_parse_float_or_inf(b) for b in losses],
        _parse_float_or_nan(tree["tokens_per_second"]),
    )


def _parse_difference(tree: dict[str, Any]) -> PairedDifference:
    low, high, p, more = (tree[name] for name in ("low", "high", "p", "more"))
    return PairedDifference(
        _parse_float_or_nan(tree["mean"]),
        _parse_optional_float(low),
        _parse_optional_float(high),
        _parse_optional_float(p),
        None if more is None else int(more),
    )


def _parse_speedup(tree: dict[str, Any] | None) -> Speedup | None:
    if tree is None:
        return None
    return Speedup(
        _parse_float_or_nan(tree["ratio"]),
        _parse_optional_float(tree["low"]),
        _parse_optional_float(tree["high"]),
    )


def _parse_optional_float(value: Any) -> float | None:
    return None if value is None else float(value)


def _parse_float_or_inf(value: Any) -> float:
    """A loss; None stands for infinity, which JSON does not have."""
    return math.inf if value is None else float(value)


def _parse_float_or_nan(value: Any) -> float:
    """A time, speed or difference; None stands for NaN, which JSON does not have."""
    return math.nan if value is None else float(value)
