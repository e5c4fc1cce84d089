"""A training from a checkpoint, or the beginning, to its end: saved on the way, stopped when asked,
taken back after a spike, given up when it has diverged.
"""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from mlxgpt.backend.cpu import jit as compiler
from mlxgpt.config import Config, override
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.distributed.group import LOCAL, ProcessGroup
from mlxgpt.errors import UserError
from mlxgpt.machine import device, device_errors, mac
from mlxgpt.machine.device_errors import DeviceError
from mlxgpt.storage import checkpoint
from mlxgpt.storage.checkpoint import Checkpoint
from mlxgpt.storage.notes import Notes
from mlxgpt.storage.run import Run
from mlxgpt.training import together
from mlxgpt.training.callback import Callback
from mlxgpt.training.guard import MOST_RETURNS, Guard
from mlxgpt.training.hooks import Hooks
from mlxgpt.training.saver import Saver, is_regular
from mlxgpt.training.step import TrainStep
from mlxgpt.training.trainer import Hook, Metrics, train

T = TypeVar("T")
PAUSES = (5.0, 20.0, 60.0)  # seconds before each retry of a row
pause = time.sleep


class Diverged(UserError):
    """A training was given up: its loss leapt, or was no number, again and again."""


def with_retries(
    attempt: Callable[[Config], T],
    config: Config,
    folder: Path,
    note: Callable[[str], None],
    group: ProcessGroup = LOCAL,
) -> T:
    """Retry after a failure of the GPU, at most `len(PAUSES)` times in a row. A row ends when an
    attempt logs or saves a step that no attempt before it reached.

    Where memory ran out, the next attempt takes micro-batches of half the size, and twice as many.

    Args:
        attempt: what may fail. It creates all its arrays itself, from the run's newest checkpoint
            or from the start: those of a failed attempt may hold anything.
        folder: the run's.
        group: if it has several ranks, none retries: the first failure is raised.

    Raises:
        UserError: if the GPU keeps failing.
    """
    if group.size > 1:
        return attempt(config)
    failures, furthest = 0, 0
    while True:
        try:
            return attempt(config)
        except RuntimeError as error:
            line, failure = compiler.disable_after_failure(error), device_errors.classify(error)
            if not line and not failure:
                raise
        # Out of the handler, where nothing holds the failed attempt's arrays any more.
        _release_device()
        if line:
            note(f"{line}; starting over")
            continue
        assert failure
        saved = checkpoint.steps(folder / "checkpoints")
        reached = max([0, *saved, *(record["step"] for record in Notes(folder).metrics())])
        failures = 1 if reached > furthest else failures + 1
        furthest = max(furthest, reached)
        outcome = f"; stopped, and saved at step {saved[-1]:,}" if saved else "; nothing was saved"
        if failures > len(PAUSES):
            outcome = f", {failures} times in a row{outcome}"
        if failures > len(PAUSES) or not failure.recoverable:
            raise failure.to_user_error(outcome)
        if failure.out_of_memory:
            config = _with_smaller_batch(config, failure, outcome)
        problem, seconds = failure.to_user_error().problem, PAUSES[failures - 1]
        note(f"{problem}; trying again in {seconds:g} s")
        pause(seconds)


def _with_smaller_batch(config: Config, failure: DeviceError, outcome: str) -> Config:
    """The same step in smaller micro-batches: half as large, where their size is even."""
    t = config.train
    size = next((n for n in range(t.batch_size // 2, 0, -1) if t.batch_size % n == 0), None)
    if size is None:
        raise failure.to_user_error(f", with one sequence at a time{outcome}")
    accumulation = t.gradient_accumulation_steps * t.batch_size // size
    return override(config, {"batch_size": size, "gradient_accumulation_steps": accumulation})


def _release_device() -> None:
    """Wait for what a failed attempt left on the device, and free its memory."""
    gc.collect()
    for _ in range(2):  # commands behind the failed one may have failed, too
        with suppress(RuntimeError):
            mx.synchronize()
    mx.clear_cache()


def resume(
    run: Run, step_function: TrainStep, config: Config, callback: Callback
) -> tuple[int, dict[str, Any], Guard]:
    """Load the newest checkpoint: its step, the numbers noted with it, and its guard.

    Raises:
        UserError: if none is whole.
    """
    saved = _newest(run, run.steps(), step_function, callback)
    callback.on_note(f"resuming {run.name} from step {saved.step:,}")
    guard = Guard.of(saved.guard, config.train.on_spike)
    if guard.gives_up:  # who asks again gets another chance
        guard.in_a_row = guard.returns = 0
    known = saved.metrics.keys() == {"lr", "loss", "grad_norm"}
    return saved.step, saved.metrics if known else {}, guard


def _newest(run: Run, steps: list[int], step_function: TrainStep, callback: Callback) -> Checkpoint:
    """Load the newest of some checkpoints that is whole."""
    paths = [checkpoint.path_of(run.checkpoints, step) for step in reversed(steps)]
    saved = run.load_first(paths, callback.on_note, with_optimizer=True)
    assert saved.optimizer is not None
    step_function.restore(saved.parameters, saved.optimizer)
    return saved


def proceed(
    run: Run,
    dataset: Dataset,
    step_function: TrainStep,
    guard: Guard,
    callback: Callback,
    *,
    start: int,
    limit: int | None = None,
    make_up: dict[str, Any] | None = None,
    group: ProcessGroup = LOCAL,
) -> int:
    """Train from step `start` on; everything is saved at the end, whichever it is.

    Args:
        limit: bytes; a training that takes more is stopped.
        make_up: the numbers of step `start`, where it was saved but not evaluated and logged.
        group: the ranks that take the same steps; this is the main one. The others follow.

    Returns:
        Updates done in all.

    Raises:
        UserError: if it was stopped for a cause that a user can mend.
    """
    config = run.config
    with Saver(run, config.train.keep_checkpoints, callback.on_save) as saver:
        hooks = Hooks(run, dataset, step_function, callback, guard, saver)
        hooks.begin(start)
        if make_up:
            metrics = Metrics(start, seconds=0.0, **make_up)
            for hook in hooks.after_saving:
                if hook.due(start):
                    hook.run(metrics)
        group.barrier("before the first step")

        def can_go_back() -> bool:
            saver.wait()
            can = bool(_regular(run))
            if not can:
                callback.on_note(
                    "the loss leapt: left out, as there is no checkpoint to go back to"
                )
            return group.broadcast("can go back", can)

        with stop_signals(callback) as asked, compiler.undisturbed(), mac.awake():
            step, over = train_through(
                step_function,
                dataset,
                config,
                guard,
                start=start,
                hooks=hooks.all,
                wish=lambda: saver.failed() or hooks.failed() or asked(),
                limit=limit,
                group=group,
                can_go_back=can_go_back,
                go_back=lambda: _go_back(run, step_function, guard, hooks, callback, group),
            )
        saver.wait()
        if step not in run.steps():
            hooks.save_now(step)
        hooks.finish(step)
        run.sync_notes()
    over = any(group.gather("over the memory limit", over))
    if guard.gives_up:
        raise _gives_up(config, guard, step)
    if over and step < config.train.max_steps:
        raise UserError(
            f"the training took more than {(limit or 0) / 1e9:g} GB: stopped and saved at step "
            f"{step:,}",
            "the same command with a larger --memory-limit goes on from there.",
        )
    return step


def train_through(
    step_function: TrainStep,
    dataset: Dataset,
    config: Config,
    guard: Guard,
    *,
    start: int,
    hooks: Sequence[Hook],
    wish: Callable[[], bool],
    limit: int | None,
    group: ProcessGroup,
    can_go_back: Callable[[], bool],
    go_back: Callable[[], int],
) -> tuple[int, bool]:
    """Train from step `start` on to the end, through spikes; until it is stopped, or given up. The
    first rank and the others alike, so that all take the same steps.

    Args:
        hooks: this rank's own.
        wish: whether it is to stop, asked after each step.
        limit: bytes; it stops, too, when it takes more.
        can_go_back: asked at a spike, see `train`.
        go_back: then goes back, and gives the step to go on from.

    Returns:
        Updates done in all; and whether it took more than `limit` after the last of them.
    """
    over = False

    def stop() -> bool:
        nonlocal over
        over = limit is not None and device.memory()[0] > limit
        return group.should_stop(over or wish())

    hooks = together.hooks(group, step_function, config, hooks)
    while True:
        start = train(
            step_function,
            dataset.train,
            config,
            start=start,
            hooks=hooks,
            stop=stop,
            guard=guard,
            can_go_back=can_go_back,
        )
        if guard.gives_up or guard.spiked is None:
            return start, over
        start = go_back()


def _go_back(
    run: Run,
    step_function: TrainStep,
    guard: Guard,
    hooks: Hooks,
    callback: Callback,
    group: ProcessGroup,
) -> int:
    """After a spike: to the newest checkpoint; the step to go on from."""
    assert guard.spiked is not None
    spiked = guard.spiked + 1
    saved = _newest(run, _regular(run), step_function, callback)
    callback.on_note(
        f"the loss leapt at step {spiked:,}: back to step {saved.step:,}, and on with other batches"
    )
    guard.go_back(saved.step, saved.guard)
    together.begin(group, step_function, run, saved.step, saved.guard)
    run.cut(saved.step)
    run.add_return(saved.step, spiked)
    hooks.begin(saved.step)
    return saved.step


def _regular(run: Run) -> list[int]:
    """The steps of the checkpoints that would be there also if nobody had stopped the training, so
    that going back does not hang on that.
    """
    return [step for step in run.steps() if is_regular(run.config, step)]


def _gives_up(config: Config, guard: Guard, step: int) -> Diverged:
    why = (
        f"the loss leapt again after going back {MOST_RETURNS} times"
        if guard.returns > MOST_RETURNS
        else f"{guard.in_a_row} steps in a row without a loss and a gradient to learn from"
    )
    rate = config.optim.learning_rate
    causes = [f"a lower --learning-rate than {rate:g}, or more --warmup-steps"]
    if config.train.dtype != "float32":
        causes.append("--dtype float32")
    if not config.optim.grad_clip:
        causes.append("--grad-clip 1")
    return Diverged(
        f"the training has diverged: {why}; stopped at step {step:,}, and saved with the weights "
        "of the last good one",
        f"begin a new run with {', '.join(causes)}; or look for strange passages in the text.",
    )


@contextmanager
def stop_signals(callback: Callback) -> Iterator[Callable[[], bool]]:
    """While a training runs, the first Ctrl-C (or SIGTERM) asks it to stop after its step; the
    second one quits at once. Yields a function that tells whether it was asked.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        # From another thread, since this one may be in the middle of writing something.
        line = "stopping after this step, and saving; once more quits at once"
        threading.Thread(target=callback.on_note, args=(line,)).start()

    for number in signals:
        signal.signal(number, handle)
    try:
        yield asked.is_set
    except RuntimeError as error:
        if asked.is_set() and device_errors.classify(error):
            raise KeyboardInterrupt from error  # instead of a retry
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
