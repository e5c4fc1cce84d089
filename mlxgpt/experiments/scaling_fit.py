"""Fit a scaling law to the losses of several sizes and lengths.

For given exponents the loss is linear in the other three numbers, so every pair of exponents on a
grid is solved exactly, and the best is the fit: there is no starting point and no local minimum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np

from mlxgpt.experiments.statistics import ALPHA, t_quantile
from mlxgpt.training.scaling_law import ScalingLaw

MIN_POINTS = 6  # five numbers are fitted
EXPONENTS = np.geomspace(0.05, 2.0, 50)
BOOTSTRAP_FITS = 400


@dataclass(frozen=True)
class ScalingPoint:
    """Mean loss of the runs of one size and length."""

    parameters: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class ScalingFit:
    """A law, and fits to resampled losses (parametric bootstrap), which show its errors.

    Attributes:
        residual: standard deviation of the losses around the law.
        degrees_of_freedom: number of points minus five.
    """

    law: ScalingLaw
    resampled: list[ScalingLaw]
    residual: float
    degrees_of_freedom: int

    def interval(self, parameters: float, tokens: float) -> tuple[float, float]:
        """95% interval of a new measurement: the law's error, and the scatter around it."""
        losses = [law.predict(parameters, tokens) for law in self.resampled]
        margin = t_quantile(ALPHA, self.degrees_of_freedom) * math.hypot(
            float(np.std(losses)), self.residual
        )
        middle = self.law.predict(parameters, tokens)
        return middle - margin, middle + margin

    def errors(self) -> dict[str, tuple[float, float]]:
        """95% interval of each number of the law."""
        columns = np.array([astuple(law) for law in self.resampled]).T
        names = [field.name for field in fields(ScalingLaw)]
        return {name: _central(column) for name, column in zip(names, columns, strict=True)}

    def tokens_per_parameter(self, flops: float) -> tuple[float, float, float]:
        """Tokens per parameter of the size with the lowest loss for 6·parameters·tokens FLOPs, and
        its 95% interval. NaN if the loss does not depend on one of them.
        """
        ratios = np.array([best_tokens_per_parameter(law, flops) for law in self.resampled])
        low, high = _central(ratios[np.isfinite(ratios)])
        return best_tokens_per_parameter(self.law, flops), low, high


def fit_scaling_law(points: Sequence[ScalingPoint], seed: int = 0) -> ScalingFit:
    """Fit the law by least squares.

    Args:
        points: at least MIN_POINTS, with finite losses.
        seed: of the bootstrap.
    """
    losses = np.array([point.loss for point in points])
    if len(points) < MIN_POINTS or not np.isfinite(losses).all():
        raise ValueError(f"a scaling law needs {MIN_POINTS} finite losses")
    sizes = np.array([[point.parameters, point.tokens] for point in points], dtype=float)
    (law,) = _fit_columns(sizes, losses[:, None])
    fitted = np.array([law.predict(*size) for size in sizes])
    degrees_of_freedom = len(points) - 5
    residual = math.sqrt(float(((losses - fitted) ** 2).sum()) / degrees_of_freedom)
    noise = np.random.default_rng(seed).normal(0, residual, (len(points), BOOTSTRAP_FITS))
    resampled = _fit_columns(sizes, fitted[:, None] + noise)
    return ScalingFit(law, resampled, residual, degrees_of_freedom)


# The numbers E, A, B must not be negative: all of these subsets are tried, the others being 0.
SUBSETS = ([0, 1, 2], [0, 1], [0, 2], [1, 2], [0])


def _fit_columns(sizes: np.ndarray, losses: np.ndarray) -> list[ScalingLaw]:
    """Best law for each column of losses [points, fits]; sizes [points, 2]."""
    lowest_error = np.full(losses.shape[1], np.inf)
    best = np.zeros((losses.shape[1], 5))
    for alpha, beta in itertools.product(EXPONENTS, EXPONENTS):
        terms = np.column_stack([np.ones(len(sizes)), (sizes / 1e6) ** [-alpha, -beta]])
        for subset in SUBSETS:
            solution = np.linalg.pinv(terms[:, subset]) @ losses
            error = ((terms[:, subset] @ solution - losses) ** 2).sum(0)
            is_better = (error < lowest_error) & (solution >= 0).all(0)
            lowest_error[is_better] = error[is_better]
            numbers = np.zeros((3, losses.shape[1]))
            numbers[subset] = solution
            constant = np.ones_like(error)
            law = [numbers[0], numbers[1], alpha * constant, numbers[2], beta * constant]
            best[is_better] = np.stack(law, axis=1)[is_better]
    return [ScalingLaw(*map(float, row)) for row in best]


def best_tokens_per_parameter(law: ScalingLaw, flops: float) -> float:
    """Tokens per parameter at the lowest loss for 6·N·D FLOPs, where α·A·N^-α = β·B·D^-β."""
    if not law.a or not law.b:
        return math.nan
    product = flops / 6 / 1e12  # N·D, in millions
    power = 1 / (law.alpha + law.beta)
    parameters = (law.alpha * law.a / (law.beta * law.b) * product**law.beta) ** power
    return product / parameters**2


def _central(values: np.ndarray) -> tuple[float, float]:
    """The central 95% of the values."""
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)
