"""How a run went: its metrics as arrays, and what happened on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxgpt.storage.run import Run

METRIC_NAMES = (
    "loss",
    "val_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "peak_share",
    "memory_bytes",
    "skipped",
)
X_AXES = ("steps", "million tokens", "minutes")


@dataclass(frozen=True)
class RunMetrics:
    """A run's metrics: arrays with a number for each record; NaN where it has none.

    Attributes:
        minutes: of training until then; evaluations, checkpoints and pauses are not counted.
        values: by the names in NUMBERS.
        events: (step, what happened there) in their order.
        estimate: what the training was said to take when it began; {} where that is not known.
    """

    steps: np.ndarray
    tokens: np.ndarray
    minutes: np.ndarray
    values: dict[str, np.ndarray]
    events: list[tuple[int, str]]
    estimate: dict[str, float]

    def x_values(self, name: str) -> np.ndarray:
        """One of AXES."""
        return {
            "steps": self.steps,
            "million tokens": self.tokens / 1e6,
            "minutes": self.minutes,
        }[name]

    def x_at_step(self, step: int, axis: str) -> float:
        """Where a step lies on an axis."""
        return float(np.interp(step, self.steps, self.x_values(axis))) if len(self.steps) else 0.0

    def last_value(self, name: str) -> float | None:
        """The last number of a name; None where there is none."""
        finite = self.values[name][np.isfinite(self.values[name])]
        return float(finite[-1]) if len(finite) else None


def load_run_metrics(run: Run) -> RunMetrics:
    """A run's course, as far as it came."""
    records = list(run.metrics())
    steps = np.array([record["step"] for record in records], dtype=float)
    values = {
        n: np.array([_parse_number(r.get(n)) for r in records], dtype=float) for n in METRIC_NAMES
    }
    new_tokens = np.diff(steps, prepend=0.0) * run.config.tokens_per_step
    rates = values["tokens_per_second"]
    seconds = np.divide(new_tokens, rates, out=np.zeros_like(new_tokens), where=rates > 0)
    history = list(run.history())
    start_entry = next((line for line in history if isinstance(line.get("forecast"), dict)), {})
    return RunMetrics(
        steps=steps,
        tokens=steps * run.config.tokens_per_step,
        minutes=np.cumsum(seconds) / 60,
        values=values,
        events=sorted([*_skipped_step_events(steps, values["skipped"]), *_history_events(history)]),
        estimate={
            name: _parse_number(value)
            for name, value in start_entry.get("forecast", {}).items()
            if np.isfinite(_parse_number(value))
        },
    )


def _parse_number(value: Any) -> float:
    """A number as a stranger's file has it; NaN where it is none."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e30 else np.nan


def _skipped_step_events(steps: np.ndarray, skipped: np.ndarray) -> list[tuple[int, str]]:
    """Where steps were not applied: their count rises."""
    increase = np.diff(skipped, prepend=0.0)
    return [(int(steps[n]), f"{increase[n]:.0f} left out") for n in np.flatnonzero(increase > 0)]


def _history_events(history: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Where it was taken up again, and where it went back."""
    events = []
    for index, line in enumerate(history):
        if type(line.get("spiked")) is int:
            events.append((line["step"], f"back to here from {line['spiked']:,}"))
        elif index:
            events.append((line["step"], "stopped, and resumed"))
    return events
