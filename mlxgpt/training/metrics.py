"""Metrics of training steps: the records of metrics.jsonl, and the training speed."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mlxgpt.backend import device
from mlxgpt.config import Config
from mlxgpt.model.stats import training_flops_per_token


@dataclass
class StepMetrics:
    """Metrics of a training step and, if it was evaluated, of its evaluation.

    Attributes:
        step: step number, from 1.
        lr: learning rate of this step.
        loss: mean training loss of this step's batch before the update, nats per token.
        grad_norm: global gradient norm before clipping.
        seconds: when the step had started on the device; see `StepTimer.elapsed_seconds`.
        eval_metrics: metrics of the evaluation, by name.
    """

    step: int
    lr: float
    loss: float
    grad_norm: float
    seconds: float
    eval_metrics: dict[str, float] = field(default_factory=dict)

    def to_tree(self) -> dict[str, float]:
        """Values stored in a checkpoint, so that a killed run can log them when it resumes."""
        return {"lr": self.lr, "loss": self.loss, "grad_norm": self.grad_norm}


class StepTimer:
    """Times training steps, excluding pauses in which the device waits for the host. A step runs
    once it is queued and the previous one is done, so the time between the starts of two steps is
    the duration of the steps between them.

    Args:
        tokens_per_step: without padding.
        ranks: number of ranks, to compute the peak FLOP/s of all of them.
    """

    def __init__(self, config: Config, tokens_per_step: float, ranks: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = training_flops_per_token(config)
        self._peak_flops = ranks * device.matmul_peak(config.train.dtype)
        self.restart(0)

    def restart(self, step: int) -> None:
        """Restart timing after `step` steps."""
        self._last_step, self._last_seconds = step + 1, 0.0
        self._start_time: float | None = None
        self._paused_seconds = 0.0

    def elapsed_seconds(self) -> float:
        """Seconds since the first step started, without pauses."""
        now = time.monotonic()  # stops while the machine sleeps
        self._start_time = now if self._start_time is None else self._start_time
        return now - self._start_time - self._paused_seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Context whose time is excluded, because the device has no step to compute."""
        start_time = time.monotonic()
        yield
        self._paused_seconds += time.monotonic() - start_time

    def record(self, metrics: StepMetrics, skipped: int) -> dict[str, Any]:
        """Make a record for metrics.jsonl; `skipped` is the number of steps skipped so far."""
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
    """The value, or None if it is NaN or infinite, which JSON cannot hold."""
    return value if math.isfinite(value) else None
