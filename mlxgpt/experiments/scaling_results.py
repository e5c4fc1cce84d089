"""Result of a scaling study as dataclasses, and parsing of its JSON."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, fields
from typing import Any

from mlxgpt.experiments.results import RECORD_FORMAT
from mlxgpt.experiments.scaling_fit import ScalingFit, ScalingPoint
from mlxgpt.training.scaling_law import ScalingLaw
from mlxgpt.utils import json_files
from mlxgpt.utils.errors import UserError


@dataclass(frozen=True)
class ModelSize:
    """A size, and how long a step takes on this machine."""

    n_layer: int
    n_embd: int
    parameters: int
    step_seconds: float

    @property
    def name(self) -> str:
        """n_layer × n_embd"""
        return f"{self.n_layer} × {self.n_embd}"


@dataclass
class LengthResult:
    """Runs of one size and length.

    Attributes:
        losses: bits per byte for each seed; infinite if the run diverged.
    """

    size: ModelSize
    steps: int
    tokens: int
    losses: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Size and length."""
        return f"{self.size.name}, {self.steps:,} steps"

    @property
    def point(self) -> ScalingPoint:
        """The mean of the seeds."""
        return ScalingPoint(self.size.parameters, self.tokens, statistics.fmean(self.losses))


@dataclass(frozen=True)
class SizeAdvice:
    """The best size for a training time.

    Attributes:
        loss, low, high: predicted bits per byte, with a 95% interval.
        epochs: how often the text is seen.
    """

    minutes: float
    size: ModelSize
    tokens: int
    epochs: float
    loss: float
    low: float
    high: float


@dataclass
class ScalingRecord:
    """Result of a scaling study.

    Attributes:
        budget, recipe: as passed by the user.
        data: name of the dataset; `held_out_bytes` of it are held out, `train_tokens` remain.
        fitted: results that the law is fitted to, by size and length.
        test: a larger size, which the fit has not seen.
        fit, advice: None and empty until all runs are finished, or if one diverged.
    """

    name: str
    budget: str
    recipe: str
    data: str
    train_tokens: int
    held_out_bytes: int
    machine: str
    fitted: list[LengthResult]
    test: LengthResult
    fit: ScalingFit | None = None
    advice: list[SizeAdvice] = field(default_factory=list)
    interrupted: bool = False

    @property
    def results(self) -> list[LengthResult]:
        """All results, the test last."""
        return [*self.fitted, self.test]

    @property
    def law_holds(self) -> bool:
        """Whether there is a law, and the loss of the test is in the interval that it predicts."""
        if not self.fit:
            return False
        low, high = self.fit.interval(self.test.size.parameters, self.test.tokens)
        return low <= self.test.point.loss <= high


def parse_scaling_record(text: str) -> ScalingRecord:
    """Parse a record from JSON.

    Raises:
        UserError: if it is not a valid record, or in a newer format.
    """
    try:
        tree = json_files.parse_json(text)
        json_files.check_format(tree, RECORD_FORMAT, "this scaling study")
        record = ScalingRecord(
            name=str(tree["name"]),
            budget=str(tree["budget"]),
            recipe=str(tree["recipe"]),
            data=str(tree["data"]),
            train_tokens=_parse_positive(tree["train_tokens"]),
            held_out_bytes=int(tree["held_out_bytes"]),
            machine=str(tree["machine"]),
            fitted=[_parse_result(result) for result in tree["fitted"]],
            test=_parse_result(tree["test"]),
            fit=_parse_fit(tree["fit"]) if tree["fit"] else None,
            advice=[_parse_advice(advice) for advice in tree["advice"]],
            interrupted=bool(tree["interrupted"]),
        )
        if not record.fitted or (record.fit and not all(r.losses for r in record.results)):
            raise ValueError("a law without losses")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise UserError(
            "this is not a valid scaling study",
            "use the JSON file that `mlxgpt scale` wrote to runs/compare.",
        ) from error
    return record


def _parse_positive(value: Any) -> int:
    number = int(value)
    if number < 1:
        raise ValueError(f"{number} is not positive")
    return number


def _parse_size(tree: dict[str, Any]) -> ModelSize:
    layers, width, parameters = (
        _parse_positive(tree[name]) for name in ("n_layer", "n_embd", "parameters")
    )
    return ModelSize(layers, width, parameters, float(tree["step_seconds"]))


def _parse_result(tree: dict[str, Any]) -> LengthResult:
    losses = [float("inf") if loss is None else float(loss) for loss in tree["losses"]]
    size, tokens = _parse_size(tree["size"]), _parse_positive(tree["tokens"])
    return LengthResult(size, _parse_positive(tree["steps"]), tokens, losses)


def _parse_advice(tree: dict[str, Any]) -> SizeAdvice:
    epochs, *losses = (float(tree[name]) for name in ("epochs", "loss", "low", "high"))
    size, tokens = _parse_size(tree["size"]), _parse_positive(tree["tokens"])
    return SizeAdvice(float(tree["minutes"]), size, tokens, epochs, *losses)


def _parse_fit(tree: dict[str, Any]) -> ScalingFit:
    return ScalingFit(
        _parse_law(tree["law"]),
        [_parse_law(law) for law in tree["resampled"]],
        float(tree["residual"]),
        _parse_positive(tree["degrees_of_freedom"]),
    )


def _parse_law(tree: dict[str, Any]) -> ScalingLaw:
    return ScalingLaw(**{field.name: float(tree[field.name]) for field in fields(ScalingLaw)})
