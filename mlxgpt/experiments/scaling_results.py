"""Result of a scaling study as dataclasses, and parsing of its JSON."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from mlxgpt.experiments.scaling_fit import ScalingFit, ScalingPoint
from mlxgpt.training.scaling_law import ScalingLaw
from mlxgpt.utils import files
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


def parse_scaling_record(text: str) -> ScalingRecord:
    """Parse a record from JSON.

    Raises:
        UserError: if it is not a valid record.
    """
    try:
        tree = files.parse_json(text)
        return ScalingRecord(
            name=str(tree["name"]),
            budget=str(tree["budget"]),
            recipe=str(tree["recipe"]),
            data=str(tree["data"]),
            train_tokens=int(tree["train_tokens"]),
            held_out_bytes=int(tree["held_out_bytes"]),
            machine=str(tree["machine"]),
            fitted=[_parse_result(result) for result in tree["fitted"]],
            test=_parse_result(tree["test"]),
            fit=_parse_fit(tree["fit"]) if tree["fit"] else None,
            advice=[
                SizeAdvice(**{**advice, "size": ModelSize(**advice["size"])})
                for advice in tree["advice"]
            ],
            interrupted=bool(tree["interrupted"]),
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            "this is not a valid scaling study",
            "use the JSON file that `mlxgpt scale` wrote to runs/compare.",
        ) from error


def _parse_result(tree: dict[str, Any]) -> LengthResult:
    losses = [float("inf") if loss is None else float(loss) for loss in tree["losses"]]
    return LengthResult(ModelSize(**tree["size"]), int(tree["steps"]), int(tree["tokens"]), losses)


def _parse_fit(tree: dict[str, Any]) -> ScalingFit:
    return ScalingFit(
        ScalingLaw(**tree["law"]),
        [ScalingLaw(**law) for law in tree["resampled"]],
        float(tree["residual"]),
        int(tree["degrees_of_freedom"]),
    )
