"""Metrics of training steps: what a line of metrics.jsonl holds, and how fast training is."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mlxgpt.backend import device
from mlxgpt.config import Config
from mlxgpt.model.stats import flops_per_token


@dataclass
class StepMetrics:
    """Metrics of a step, to which an evaluation adds its own.

    Attributes:
        step: updates done, from 1.
        lr: learning rate of this step.
        loss: mean training loss of this step's batch, nats per token, before its update.
        grad_norm: the gradient's global norm before clipping.
        seconds: when the step was running on the device; see `StepTimer`.
        eval_metrics: those of an evaluation, by name.
    """

    step: int
    lr: float
    loss: float
    grad_norm: float
    seconds: float
    eval_metrics: dict[str, float] = field(default_factory=dict)

    def to_tree(self) -> dict[str, float]:
        """What a checkpoint stores, so that a killed run can log it when it is resumed."""
        return {"lr": self.lr, "loss": self.loss, "grad_norm": self.grad_norm}


class StepTimer:
    """Times steps, without the pauses in which the device waits for the host. A step runs once it
    was handed over and the one before it is computed, so the time between two of them is what the
    steps between took.

    Args:
        ranks: that train together, for the peak that a speed is compared with.
    """

    def __init__(self, config: Config, ranks: int) -> None:
        self._tokens_per_step = config.tokens_per_step
        self._flops_per_token = flops_per_token(config.model)
        self._peak_flops = ranks * device.matmul_peak(config.train.dtype)
        self.restart(0)

    def restart(self, step: int) -> None:
        """Count from the step after `step` on."""
        self._last_step, self._last_seconds = step + 1, 0.0
        self._start_time: float | None = None
        self._paused_seconds = 0.0

    def elapsed_seconds(self) -> float:
        """Seconds since the first step ran, without pauses."""
        now = time.monotonic()  # a clock that stands still while the machine sleeps
        self._start_time = now if self._start_time is None else self._start_time
        return now - self._start_time - self._paused_seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Context whose time does not count: the device has no step to compute."""
        start_time = time.monotonic()
        yield
        self._paused_seconds += time.monotonic() - start_time

    def record(self, metrics: StepMetrics, skipped: int) -> dict[str, Any]:
        """A line of metrics.jsonl; `skipped` steps were not applied so far."""
        seconds = metrics.seconds - self._last_seconds
        tokens_per_second = 0.0
        if seconds > 0:
            tokens_per_second = (metrics.step - self._last_step) * self._tokens_per_step / seconds
            self._last_step, self._last_seconds = metrics.step, metrics.seconds
        return {
            "step": metrics.step,
            "loss": _finite_or_none(metrics.loss),
            "lr": metrics.lr,
            "grad_norm": _finite_or_none(metrics.grad_norm),
            "tokens_per_second": tokens_per_second,
            "peak_share": tokens_per_second * self._flops_per_token / self._peak_flops,
            "memory_bytes": device.memory_in_use()[0],
            "skipped": skipped,
            **{name: _finite_or_none(value) for name, value in metrics.eval_metrics.items()},
        }


def _finite_or_none(value: float) -> float | None:
    """The value, or None if JSON cannot hold it."""
    return value if math.isfinite(value) else None
