"""How a run went: its metrics as arrays, and what happened on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxgpt.storage.run import Run

NUMBERS = (
    "loss",
    "val_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "peak_share",
    "memory_bytes",
    "skipped",
)
AXES = ("steps", "million tokens", "minutes")


@dataclass(frozen=True)
class Course:
    """A run's metrics: arrays with a number for each record; NaN where it has none.

    Attributes:
        minutes: of training until then; evaluations, checkpoints and pauses are not counted.
        values: by the names in NUMBERS.
        events: (step, what happened there) in their order.
        forecast: what the training was said to take when it began; {} where that is not known.
    """

    steps: np.ndarray
    tokens: np.ndarray
    minutes: np.ndarray
    values: dict[str, np.ndarray]
    events: list[tuple[int, str]]
    forecast: dict[str, float]

    def axis(self, name: str) -> np.ndarray:
        """One of AXES."""
        return {
            "steps": self.steps,
            "million tokens": self.tokens / 1e6,
            "minutes": self.minutes,
        }[name]

    def place(self, step: int, axis: str) -> float:
        """Where a step lies on an axis."""
        return float(np.interp(step, self.steps, self.axis(axis))) if len(self.steps) else 0.0

    def last(self, name: str) -> float | None:
        """The last number of a name; None where there is none."""
        known = self.values[name][np.isfinite(self.values[name])]
        return float(known[-1]) if len(known) else None


def course_of(run: Run) -> Course:
    """A run's course, as far as it came."""
    records = list(run.metrics())
    steps = np.array([record["step"] for record in records], dtype=float)
    values = {n: np.array([_number(r.get(n)) for r in records], dtype=float) for n in NUMBERS}
    new = np.diff(steps, prepend=0.0) * run.config.tokens_per_step
    rates = values["tokens_per_second"]
    seconds = np.divide(new, rates, out=np.zeros_like(new), where=rates > 0)
    history = list(run.history())
    begun = next((line for line in history if isinstance(line.get("forecast"), dict)), {})
    return Course(
        steps=steps,
        tokens=steps * run.config.tokens_per_step,
        minutes=np.cumsum(seconds) / 60,
        values=values,
        events=sorted([*_left_out(steps, values["skipped"]), *_of_history(history)]),
        forecast={
            name: _number(value)
            for name, value in begun.get("forecast", {}).items()
            if np.isfinite(_number(value))
        },
    )


def _number(value: Any) -> float:
    """A number as a stranger's file has it; NaN where it is none."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e30 else np.nan


def _left_out(steps: np.ndarray, skipped: np.ndarray) -> list[tuple[int, str]]:
    """Where steps were not applied: their count rises."""
    more = np.diff(skipped, prepend=0.0)
    return [(int(steps[n]), f"{more[n]:.0f} left out") for n in np.flatnonzero(more > 0)]


def _of_history(history: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Where it was taken up again, and where it went back."""
    told = []
    for number, line in enumerate(history):
        if type(line.get("spiked")) is int:
            told.append((line["step"], f"back to here from {line['spiked']:,}"))
        elif number:
            told.append((line["step"], "stopped, and resumed"))
    return told
