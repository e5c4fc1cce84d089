"""What happens besides the steps of a training: saving, evaluating and sampling, logging."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from mlxgpt import checkpoint, device
from mlxgpt.config import Config, Sampling
from mlxgpt.corpus.tokens import Dataset
from mlxgpt.errors import UserError
from mlxgpt.evaluation import Evaluator
from mlxgpt.generation import generate
from mlxgpt.model import flops_per_token
from mlxgpt.run import Run
from mlxgpt.step import TrainStep
from mlxgpt.trainer import Hook, Report


class Watcher(Protocol):
    """Whoever is told of numbers and samples."""

    def log(self, record: dict[str, Any]) -> None: ...
    def sample(self, step: int, text: str) -> None: ...


class Hooks:
    """What happens besides the steps: saving, evaluating, sampling, logging, in this order, so
    that nothing is lost when an evaluation fails.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        dataset: Dataset,
        step_function: TrainStep,
        watcher: Watcher,
        start: int,
    ) -> None:
        self.run = run
        self.config = config
        self.tokenizer = dataset.tokenizer
        self.step_function = step_function
        self.watcher = watcher
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
        self.logged_step, self.logged_seconds = start, 0.0

        def every(*intervals: int) -> Callable[[int], bool]:
            return lambda step: step == last or any(step % n == 0 for n in intervals)

        save = Hook(every(t.save_interval, t.eval_interval), self.save)
        self.after_saving = [
            Hook(every(t.eval_interval), self.evaluate),
            Hook(every(t.log_interval, t.eval_interval), self.log),
        ]
        self.all = [save, *self.after_saving]

    def save(self, report: Report) -> None:
        """Write a checkpoint; delete all others but the best."""
        numbers = {"lr": report.lr, "loss": report.loss, "grad_norm": report.grad_norm}
        self._write(report.step, numbers)

    def save_now(self, step: int) -> None:
        """Write a checkpoint of the state as it is."""
        self._write(step, {})

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        checkpoint.save(
            self.run.checkpoints,
            step,
            *self.step_function.arrays(),
            tokenizer=self.tokenizer.fingerprint,
            report=numbers,
        )
        best = self.run.best()
        checkpoint.prune(self.run.checkpoints, {step, best["step"] if best else step})

    def evaluate(self, report: Report) -> None:
        """Evaluate, remember the best, and write a sample."""
        result = self.evaluator()
        report.values["val_loss"] = result.loss
        report.values["val_bits_per_byte"] = result.bits_per_byte
        best = self.run.best()
        if best is None or result.loss < best["val_loss"]:
            self.run.set_best(report.step, result.loss)
        if length := self.config.train.sample_tokens:
            sampling = Sampling(max_tokens=length, seed=self.config.train.seed)
            text = generate(self.step_function.model, self.tokenizer, "", sampling).texts[0]
            self.run.add_sample(report.step, text)
            self.watcher.sample(report.step, text)

    def log(self, report: Report) -> None:
        """Write a line of metrics."""
        if not math.isfinite(report.loss):
            raise UserError(
                f"the loss is {report.loss} at step {report.step}: the training has diverged",
                f"use a lower --learning-rate than {self.config.optim.learning_rate}, "
                "and another --run.",
            )
        tokens = (report.step - self.logged_step) * self.tokens
        seconds = report.seconds - self.logged_seconds
        rate = tokens / seconds if seconds > 0 else 0.0
        self.logged_step, self.logged_seconds = report.step, report.seconds
        record = {
            "step": report.step,
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "tokens_per_second": rate,
            "peak_share": rate * self.flops / self.peak,
            "memory_bytes": device.memory()[0],
            **report.values,
        }
        self.run.log(record)
        self.watcher.log(record)
