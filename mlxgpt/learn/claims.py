"""What a check of the course is: a claim about a reader's functions, and a test of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


class CheckFailedError(Exception):
    """A function does not do what its chapter says; the message says what differs."""


@dataclass(frozen=True)
class Check:
    """A claim about some functions of a chapter, and the test of it."""

    chapter: int
    claim: str
    test: Callable[..., None]

    @property
    def function_names(self) -> tuple[str, ...]:
        """Names of the reader's functions that the test needs."""
        return tuple(inspect.signature(self.test).parameters)


@dataclass(frozen=True)
class LearnResult:
    """Result of a check: `problem` is None if it passed."""

    claim: str
    problem: str | None = None


CHECKS: list[Check] = []


def claim(chapter: int, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that adds a test to the checks of a chapter."""

    def add(test: Callable[..., None]) -> Callable[..., None]:
        CHECKS.append(Check(chapter, text, test))
        return test

    return add


def require(condition: bool | mx.array, problem: str) -> None:
    """Raise CheckFailedError unless the condition is true."""
    if not condition:
        raise CheckFailedError(problem)


def require_close(value: Any, expected: Any, tolerance: float = 1e-6, what: str = "result") -> None:
    """Raise CheckFailedError unless both arrays have one shape and differ at most by
    `tolerance`.
    """
    value, expected = mx.array(value), mx.array(expected)
    require(
        value.shape == expected.shape, f"{what} of shape {value.shape}, expected {expected.shape}"
    )
    # -inf - -inf is NaN: values that are the same do not differ.
    difference = float(mx.where(value == expected, 0.0, mx.abs(value - expected)).max())
    require(
        difference <= tolerance,
        f"{what}: largest difference {difference:.2g} (> {tolerance:g})",
    )
