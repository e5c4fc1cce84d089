"""A run's metrics as arrays, and its events: skipped steps, rollbacks, resumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxgpt.storage.run import Run

X_AXES = ("steps", "million tokens", "minutes")


@dataclass(frozen=True)
class RunMetrics:
    """Metrics of a run: arrays with one value per logged record; NaN for missing values.

    Attributes:
        minutes: training time so far, without evaluations, checkpoints and pauses.
        values: arrays by the names in METRIC_NAMES.
        events: (step, description), sorted by step.
        estimate: estimate made at the start of the run; {} if there is none.
    """

    steps: np.ndarray
    tokens: np.ndarray
    minutes: np.ndarray
    values: dict[str, np.ndarray]
    events: list[tuple[int, str]]
    estimate: dict[str, float]

    def x_values(self, name: str) -> np.ndarray:
        """Values on an x axis, one of X_AXES."""
        return {
            "steps": self.steps,
            "million tokens": self.tokens / 1e6,
            "minutes": self.minutes,
        }[name]

    def x_at_step(self, step: int, axis: str) -> float:
        """Position of a step on an x axis, interpolated."""
        return float(np.interp(step, self.steps, self.x_values(axis))) if len(self.steps) else 0.0

    def last_value(self, name: str) -> float | None:
        """The last finite value of a metric; None if there is none."""
        finite = self.values[name][np.isfinite(self.values[name])]
        return float(finite[-1]) if len(finite) else None


METRIC_NAMES = (
    "loss",
    "val_loss",
    "base_val_loss",
    "val_margin",
    "val_accuracy",
    "val_kl",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "peak_share",
    "memory_bytes",
    "skipped",
)


def load_run_metrics(run: Run) -> RunMetrics:
    """Read a run's metrics and events."""
    records = list(run.metrics())
    steps = np.array([record["step"] for record in records], dtype=float)
    values = {
        name: np.array([_parse_number(record.get(name)) for record in records], dtype=float)
        for name in METRIC_NAMES
    }
    new_tokens = np.diff(steps, prepend=0.0) * run.tokens_per_step
    rates = values["tokens_per_second"]
    seconds = np.divide(new_tokens, rates, out=np.zeros_like(new_tokens), where=rates > 0)
    history = list(run.history())
    start_entry = next((line for line in history if isinstance(line.get("forecast"), dict)), {})
    return RunMetrics(
        steps=steps,
        tokens=steps * run.tokens_per_step,
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
    """Convert a value from an untrusted file to float; NaN if it is not a number."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e30 else np.nan


def _skipped_step_events(steps: np.ndarray, skipped: np.ndarray) -> list[tuple[int, str]]:
    """Events where the count of skipped steps increases."""
    increase = np.diff(skipped, prepend=0.0)
    return [(int(steps[n]), f"{increase[n]:.0f} skipped") for n in np.flatnonzero(increase > 0)]


def _history_events(history: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Events where the run resumed, or rolled back after a loss spike."""
    events = []
    for index, line in enumerate(history):
        if type(line.get("spiked")) is int:
            events.append((line["step"], f"rolled back from step {line['spiked']:,}"))
        elif index:
            events.append((line["step"], "resumed"))
    return events
