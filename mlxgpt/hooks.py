"""What happens besides the steps of a training: saving, evaluating and sampling, logging."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from mlxgpt import device
from mlxgpt.config import Sampling
from mlxgpt.corpus.tokens import Dataset
from mlxgpt.evaluation import Evaluator
from mlxgpt.generation import generate
from mlxgpt.guard import Guard
from mlxgpt.model import flops_per_token
from mlxgpt.run import Run
from mlxgpt.saver import Saver, is_regular
from mlxgpt.step import TrainStep
from mlxgpt.trainer import Hook, Report


class Watcher(Protocol):
    """Whoever is told of a training's numbers, samples and checkpoints."""

    def note(self, line: str) -> None: ...
    def log(self, record: dict[str, Any]) -> None: ...
    def sample(self, step: int, text: str) -> None: ...
    def saved(self, step: int, size: int, seconds: float) -> None: ...


class Hooks:
    """What happens besides the steps: saving, evaluating, sampling, logging, in this order, so
    that nothing is lost when an evaluation fails.
    """

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        step_function: TrainStep,
        watcher: Watcher,
        guard: Guard,
        saver: Saver,
    ) -> None:
        self.run = run
        config = self.config = run.config
        self.tokenizer = dataset.tokenizer
        self.step_function = step_function
        self.watcher = watcher
        self.guard, self.saver = guard, saver
        t, last = config.train, config.train.max_steps
        self.evaluator = Evaluator(
            step_function.model,
            dataset.tokenizer,
            dataset.val,
            dataset.meta.val.bytes,
            batch_size=t.batch_size,
            dtype=step_function.dtype,
        )
        self.peak = device.matmul_peak(t.dtype)
        self.flops = flops_per_token(config.model)
        self.tokens = t.batch_size * t.gradient_accumulation_steps * config.model.block_size
        self.begin(0)

        def every(*intervals: int) -> Callable[[int], bool]:
            return lambda step: step == last or any(step % n == 0 for n in intervals)

        save = Hook(lambda step: is_regular(config, step), self.save)
        self.after_saving = [
            Hook(every(t.eval_interval), self.evaluate),
            Hook(every(t.log_interval, t.eval_interval), self.log),
        ]
        self.all = [save, *self.after_saving]

    def begin(self, step: int) -> None:
        """Steps are counted from here on."""
        self.logged_step, self.logged_seconds = step, 0.0

    def save(self, report: Report) -> None:
        """Begin to write a checkpoint."""
        numbers = {"lr": report.lr, "loss": report.loss, "grad_norm": report.grad_norm}
        self._save(report.step, numbers)

    def save_now(self, step: int) -> None:
        """Write a checkpoint of the state as it is."""
        self._save(step, {})
        self.saver.wait()

    def _save(self, step: int, numbers: dict[str, float]) -> None:
        self.saver.save(step, self.step_function, numbers, self.guard.to_tree())

    def evaluate(self, report: Report) -> None:
        """Evaluate, remember the best, and write a sample."""
        result = self.evaluator()
        report.values["val_loss"] = result.loss
        report.values["val_bits_per_byte"] = result.bits_per_byte
        best = self.run.best()
        if math.isfinite(result.loss) and (best is None or result.loss < best["val_loss"]):
            self.saver.wait()  # the best is one that is there
            self.run.set_best(report.step, result.loss)
        if length := self.config.train.sample_tokens:
            sampling = Sampling(max_tokens=length, seed=self.config.train.seed)
            text = generate(self.step_function.model, self.tokenizer, "", sampling).texts[0]
            self.run.add_sample(report.step, text)
            self.watcher.sample(report.step, text)

    def log(self, report: Report) -> None:
        """Write a line of metrics."""
        tokens = (report.step - self.logged_step) * self.tokens
        seconds = report.seconds - self.logged_seconds
        rate = tokens / seconds if seconds > 0 else 0.0
        self.logged_step, self.logged_seconds = report.step, report.seconds
        record = {
            "step": report.step,
            "loss": _finite(report.loss),
            "lr": report.lr,
            "grad_norm": _finite(report.grad_norm),
            "tokens_per_second": rate,
            "peak_share": rate * self.flops / self.peak,
            "memory_bytes": device.memory()[0],
            "skipped": self.guard.skipped,
            **report.values,
        }
        self.run.log(record)
        self.watcher.log(record)


def _finite(value: float) -> float | None:
    """A number as JSON can have it."""
    return value if math.isfinite(value) else None
