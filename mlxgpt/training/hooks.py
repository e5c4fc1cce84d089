"""What happens besides the steps of a training: saving, then evaluating and sampling, then logging,
so that nothing is lost when an evaluation fails.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from mlxgpt import files
from mlxgpt.config import Config, Sampling
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.errors import UserError
from mlxgpt.inference.decoding import Decoder, NotFiniteError
from mlxgpt.inference.generation import generate
from mlxgpt.machine import device
from mlxgpt.model.counting import flops_per_token
from mlxgpt.storage.run import Run
from mlxgpt.training.callback import Callback
from mlxgpt.training.evaluating import Evaluations
from mlxgpt.training.guard import Guard
from mlxgpt.training.saver import Saver, is_regular
from mlxgpt.training.snapshots import Snapshots, is_age
from mlxgpt.training.step import TrainStep
from mlxgpt.training.trainer import Hook, Metrics


class Hooks:
    """The hooks of one training.

    Attributes:
        all: in their order.
        after_saving: those of them that are made up for, where a run was killed after it had saved.
    """

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        step_function: TrainStep,
        callback: Callback,
        guard: Guard,
        saver: Saver,
    ) -> None:
        self._run, self._step_function = run, step_function
        self._guard, self._saver = guard, saver
        self._logging = _Logging(run, guard, callback, step_function.group.size)
        evaluation = _Evaluation(run, dataset, step_function, callback, saver)
        self._snapshots = Snapshots(run, step_function, saver.beside, callback.on_note)
        t = run.config.train
        self.after_saving = [
            Hook(every(run.config, t.eval_interval), partial(self._evaluate, evaluation)),
            Hook(every(run.config, t.eval_interval, t.log_interval), self._log, needs_state=False),
        ]
        self.all = [
            Hook(partial(is_regular, run.config), self._save),
            *self.after_saving,
            Hook(is_age, lambda metrics: self._snapshots.take(metrics.step)),
        ]

    def begin(self, step: int) -> None:
        """Steps are counted from here on."""
        self._logging.begin(step)
        if is_age(step):
            self._snapshots.take(step)

    def save_now(self, step: int) -> None:
        """Write a checkpoint of the state as it is."""
        self._saver.save(step, self._step_function, {}, self._guard.to_tree())
        self._saver.wait()

    def failed(self) -> bool:
        """Whether metrics could not be written: the training is to stop."""
        return self._logging.error is not None

    def finish(self, step: int) -> None:
        """After the last step, which is saved: try again to write metrics that were not written.

        Raises:
            UserError: if the training had to stop for them.
        """
        if error := self._logging.error:
            with contextlib.suppress(OSError):
                self._logging.write()
            raise self._stopped(error, step)

    def _evaluate(self, evaluation: _Evaluation, metrics: Metrics) -> None:
        """Evaluate. If the results cannot be written, as on a full disk, training stops, saved, and
        resuming evaluates again.
        """
        try:
            evaluation(metrics)
        except OSError as error:
            raise self._stopped(error, metrics.step) from error

    def _log(self, metrics: Metrics) -> None:
        """Log. If that fails at a step that was saved, training stops: resuming logs it again."""
        self._logging(metrics)
        if self._logging.error and is_regular(self._run.config, metrics.step):
            raise self._stopped(self._logging.error, metrics.step)

    def _stopped(self, error: OSError, step: int) -> UserError:
        self._saver.wait()
        problem = files.os_error(error, "read or write", self._run.folder)
        return UserError(f"{problem.problem}; stopped and saved at step {step:,}", problem.remedy)

    def _save(self, metrics: Metrics) -> None:
        numbers = {"lr": metrics.lr, "loss": metrics.loss, "grad_norm": metrics.grad_norm}
        self._saver.save(metrics.step, self._step_function, numbers, self._guard.to_tree())


def every(config: Config, *intervals: int) -> Callable[[int], bool]:
    """Due after every so many steps, and after the last one."""
    last = config.train.max_steps
    return lambda step: step == last or any(step % n == 0 for n in intervals)


class _Evaluation:
    """Evaluates, remembers the best, and writes a sample."""

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        step_function: TrainStep,
        callback: Callback,
        saver: Saver,
    ) -> None:
        self._run, self._callback, self._saver = run, callback, saver
        self._model, self._tokenizer = step_function.model, dataset.tokenizer
        self._evaluations = Evaluations(run.config, dataset, step_function, run.bos)

    def __call__(self, metrics: Metrics) -> None:
        sample, result = self._evaluations(metrics.step)
        best = self._run.best()
        is_best = math.isfinite(sample.loss) and (best is None or sample.loss < best["val_loss"])
        metrics.values["val_loss"] = result.loss
        metrics.values["val_bits_per_byte"] = result.bits_per_byte
        metrics.values["val_tokens"] = result.tokens
        if is_best:
            self._saver.wait()  # the best is one that is there
            self._run.set_best(metrics.step, result.loss)
        if length := self._run.config.train.sample_tokens:
            sampling = Sampling(max_tokens=length, seed=self._run.config.train.seed)
            # Traced anew, since the weights are others than the last time.
            decoder = Decoder(self._model, self._tokenizer.vocab_size)
            try:
                made = generate(decoder, self._tokenizer, [""], sampling, bos=self._run.bos)
            except NotFiniteError as error:  # what to do about it is the guard's to decide
                self._callback.on_note(f"no sample: {error.problem}")
                return
            text = made.texts[0]
            self._run.add_sample(metrics.step, text)
            self._callback.on_sample(metrics.step, text)


class _Logging:
    """Writes a line of metrics. The next step was handed over by then, so a line that cannot be
    written is kept until training has stopped and is saved.

    Attributes:
        error: why a line could not be written at once.
    """

    def __init__(self, run: Run, guard: Guard, callback: Callback, machines: int) -> None:
        self._run, self._guard, self._callback = run, guard, callback
        t, model = run.config.train, run.config.model
        self._peak = machines * device.matmul_peak(t.dtype)
        self._flops = flops_per_token(model)
        self._tokens = run.config.tokens_per_step
        self._unwritten: list[dict[str, Any]] = []
        self.error: OSError | None = None
        self.begin(0)

    def begin(self, step: int) -> None:
        """Steps, and the seconds they take, are counted from the next one on."""
        self._step, self._seconds = step + 1, 0.0

    def __call__(self, metrics: Metrics) -> None:
        tokens = (metrics.step - self._step) * self._tokens
        seconds = metrics.seconds - self._seconds
        rate = 0.0
        if seconds > 0:
            rate = tokens / seconds
            self._step, self._seconds = metrics.step, metrics.seconds
        record = {
            "step": metrics.step,
            "loss": _finite(metrics.loss),
            "lr": metrics.lr,
            "grad_norm": _finite(metrics.grad_norm),
            "tokens_per_second": rate,
            "peak_share": rate * self._flops / self._peak,
            "memory_bytes": device.memory()[0],
            "skipped": self._guard.skipped,
            **{name: _finite(value) for name, value in metrics.values.items()},
        }
        self._unwritten.append(record)
        try:
            self.write()
        except OSError as error:
            self.error = self.error or error

    def write(self) -> None:
        """Write the lines that are not written yet."""
        if self.error:  # a line may be there although an error was reported, as of closing the file
            there = {record["step"] for record in self._run.metrics()}
            self._unwritten = [line for line in self._unwritten if line["step"] not in there]
        while self._unwritten:
            self._run.log(self._unwritten[0])
            self._callback.on_log(self._unwritten.pop(0))


def _finite(value: float) -> float | None:
    """A number as JSON can have it."""
    return value if math.isfinite(value) else None
