"""The loop, with a writer that records what it is asked to write."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.backend import device
from mlxgpt.config import Config, override_config
from mlxgpt.data.token_array import TokenArray
from mlxgpt.distributed.group import LocalGroup
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
from mlxgpt.training import loop, metrics
from mlxgpt.training.callbacks import Callback, TrainingSummary
from mlxgpt.training.estimate import NO_ESTIMATE
from mlxgpt.training.job import TrainJob
from mlxgpt.training.metrics import StepMetrics
from mlxgpt.training.resume import StartState
from mlxgpt.training.schedule import learning_rate_schedule
from mlxgpt.training.spike_guard import SpikeGuard
from mlxgpt.training.step import TrainStep

NEVER = 1000


@pytest.fixture
def tokens() -> TokenArray:
    return TokenArray(np.arange(500) * 7 % 19, 19)  # every token says which is next


def every(config: Config, *, save: int = NEVER, evaluate: int = NEVER, log: int = NEVER) -> Config:
    intervals = {"save_interval": save, "eval_interval": evaluate, "log_interval": log}
    return override_config(config, intervals)


def fresh(config: Config) -> TrainStep:
    return TrainStep(GPT(config.model, 1), config)


class Writer:
    """In place of the run's writer and its evaluations: records what is due.

    Args:
        after: called with what is due, and the step.
    """

    def __init__(self, after: Any = lambda name, step: None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.seen: list[StepMetrics] = []
        self.records: list[dict[str, Any]] = []
        self.rolled_back: list[int] = []
        self.run = self
        self._after = after

    def _note(self, name: str, step: int) -> None:
        self.calls.append((name, step))
        self._after(name, step)

    def save(self, step: int, metrics: StepMetrics, guard: SpikeGuard) -> None:
        self.seen.append(metrics)
        self._note("save", step)

    def validate(self, step: int) -> tuple[None, None]:
        self._note("evaluate", step)
        return None, None

    def add_evaluation(self, metrics: StepMetrics, *found: None) -> None:
        self.seen.append(metrics)

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._note("log", record["step"])

    def save_snapshot(self, step: int) -> None:
        self._note("snapshot", step)

    def has_failed(self) -> bool:
        return False

    def scheduled_checkpoint_steps(self) -> list[int]:
        return [step for name, step in self.calls if name == "save"]

    def finish(self, step: int, guard: SpikeGuard) -> None:
        """Nothing is left."""

    def truncate_after(self, step: int) -> None:
        self.rolled_back.append(step)

    def log_rollback(self, step: int, spiked: int) -> None:
        """Of the history."""


class Group(LocalGroup):
    """Asked after each step whether to stop."""

    def __init__(self, stop: Any) -> None:
        super().__init__()
        self._stop = stop

    def should_stop(self, wish: bool) -> bool:
        return bool(self._stop())


def train(
    step_function: Any,
    tokens: TokenArray,
    config: Config,
    *,
    writer: Writer | None = None,
    stop: Any = lambda: False,
    start: int = 0,
    guard: SpikeGuard | None = None,
) -> int:
    """Updates done by the loop, with this step function and this writer in their places."""
    writer = writer or Writer()
    began = StartState(start, guard or SpikeGuard(), None, None)
    dataset: Any = SimpleNamespace(train=tokens, folder=Path("data"))
    job = TrainJob(config, dataset, Path("run"), None, NO_ESTIMATE)
    if not isinstance(step_function, TrainStep):
        step_function.config = config

    @contextmanager
    def opened(*_: object) -> Iterator[tuple[Writer, StartState]]:
        yield writer, began

    def summary(run: Writer, dataset: Any, step: int, **_: Any) -> TrainingSummary:
        return TrainingSummary.for_non_main_rank(
            Path("run"), Path("data"), step, config.train.max_steps
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", lambda *_: step_function)
        patch.setattr(loop, "resume_or_create_run", opened)
        patch.setattr(loop, "RunWriter", lambda *_: nullcontext(writer))
        patch.setattr(loop, "Validation", lambda *_: writer.validate)
        patch.setattr(TrainingSummary, "from_run", summary)
        return loop.run_training_loop(job, Group(stop), Callback()).step


def test_what_is_due_comes_in_order(tiny_model: Config, tokens: TokenArray) -> None:
    """And everything at the end."""
    writer = Writer()
    config = every(tiny_model, save=6, evaluate=4, log=5)
    assert train(fresh(config), tokens, config, writer=writer) == 12
    of_all = ("save", "evaluate", "log")
    assert writer.calls == [
        ("snapshot", 0),
        *((name, 4) for name in of_all),
        ("log", 5),
        ("save", 6),
        *((name, 8) for name in of_all),
        ("log", 10),
        *((name, 12) for name in of_all),
    ]


def test_metrics_say_what_happened(tiny_model: Config, tokens: TokenArray) -> None:
    learning_rate, writer = learning_rate_schedule(tiny_model), Writer()
    config = every(tiny_model, save=1)
    train(fresh(config), tokens, config, writer=writer)
    seen = list({m.step: m for m in writer.seen}.values())
    assert [m.step for m in seen] == list(range(1, 13))
    assert [m.lr for m in seen] == [float(learning_rate(n)) for n in range(12)]
    assert seen[0].loss == pytest.approx(np.log(19), rel=0.05)
    assert seen[-1].loss < seen[0].loss
    assert all(m.grad_norm > 0 for m in seen)
    assert all(a.seconds <= b.seconds for a, b in pairwise(seen))


def test_what_waits_for_the_device_is_no_time_of_training(
    tiny_model: Config, tokens: TokenArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def slow(name: str, step: int) -> None:
        now[0] += 100

    writer = Writer(slow)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    config = every(tiny_model, save=3)
    train(fresh(config), tokens, config, writer=writer)
    assert [m.seconds for m in {m.step: m for m in writer.seen}.values()] == [0.0] * 4


class Device:
    """In place of a GPU: steps that are handed over, and computed when somebody waits for them,
    each in a second. Stands in for the step function, its numbers, MLX's functions and the clock.

    Args:
        until: the step after which it is to stop.
        blocks: whether a step is computed before the call returns, as on a CPU.
    """

    config: Config

    def __init__(self, until: int, blocks: bool) -> None:
        self.blocks = blocks
        self.calls: list[tuple[str, int]] = []
        self.until, self.handed, self.computed = until, 0, 0

    @property
    def state(self) -> int:
        return self.handed

    def state_dicts(self) -> tuple[dict, dict]:
        return {}, {}

    def __call__(self, *_: object) -> tuple[Number, Number]:
        self.handed += 1
        self.calls.append(("step", self.handed))
        if self.blocks:
            self.wait(self.handed)
        return (Number(self, self.handed),) * 2

    def wait(self, step: int) -> None:
        self.computed = max(self.computed, step)

    def stop(self) -> bool:
        return self.handed == self.until

    def replace_mlx(self, patch: pytest.MonkeyPatch) -> None:
        fake = SimpleNamespace(
            array=mx.array, random=mx.random, async_eval=lambda *_: None, eval=self.wait
        )
        patch.setattr(loop, "mx", fake)
        patch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: float(self.computed)))


class Number:
    """A loss, or a norm, that is computed once its step is: the step's number."""

    def __init__(self, device: Device, step: int) -> None:
        self.device, self.step = device, step

    def __float__(self) -> float:
        self.device.wait(self.step)
        return float(self.step)


intervals = st.integers(1, 13)


@pytest.mark.parametrize("blocks", [False, True])
@given(log=intervals, save=intervals, evaluate=intervals, until=intervals)
def test_a_step_is_logged_once_the_next_was_handed_over(
    tiny_model: Config, blocks: bool, log: int, save: int, evaluate: int, until: int
) -> None:
    """Nothing waits for the device but what needs the weights; and it all comes in the same order,
    with the same numbers, as if everything waited.
    """
    device = Device(until, blocks)

    def after(name: str, step: int) -> None:
        device.calls.append((name, step))
        if name in ("save", "evaluate"):
            assert device.computed == device.handed == step, "the weights are its step's"

    writer = Writer(after)
    tokens = TokenArray(np.arange(500) * 7 % 19, 19)
    config = every(tiny_model, save=save, evaluate=evaluate, log=log)
    with pytest.MonkeyPatch.context() as patch:
        device.replace_mlx(patch)
        done = train(device, tokens, config, writer=writer, stop=device.stop)
    assert done == min(until, 12)
    expected: list[tuple[str, int]] = [("snapshot", 0)]
    late: list[tuple[str, int]] = []
    for step in range(1, done + 1):
        evaluated = step % evaluate == 0 or step == 12
        due = {
            "save": evaluated or step % save == 0,
            "evaluate": evaluated,
            "log": evaluated or step % log == 0,
        }
        names = [(name, step) for name, is_due in due.items() if is_due]
        expected += [("step", step), *late]
        waits = due["save"]
        expected += names if waits else []
        late = [] if waits else names
    assert device.calls == expected + late
    assert all(m.loss == m.step for m in writer.seen)
    assert all(m.seconds == m.step - 1 for m in writer.seen), "a second each"
    rates = [record["tokens_per_second"] for record in writer.records]
    assert all(rate in (0.0, config.tokens_per_step) for rate in rates), "a second each"


@pytest.mark.parametrize("name", ["save", "log"])
@pytest.mark.parametrize("interval", [1, 9, 10, 13])
def test_a_spike_is_the_same_whoever_waits(
    tiny_model: Config,
    tokens: TokenArray,
    interval: int,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The losses from step 9 on are too large; nothing is remembered of the steps after it."""

    class Stop(Exception):
        pass

    class Strict(SpikeGuard):
        def loss_limit(self, step: int) -> float:
            return 8.5

    def roll_back(results: loop.StepResultHandler) -> int:
        raise Stop

    device, guard, writer = Device(13, blocks=False), Strict("rollback"), Writer()
    writer.calls.append(("save", 1))  # one to roll back to
    device.replace_mlx(monkeypatch)
    monkeypatch.setattr(loop.StepResultHandler, "roll_back", roll_back)
    with pytest.raises(Stop):
        train(device, tokens, every(tiny_model, **{name: interval}), guard=guard, writer=writer)
    assert (guard.spike_step, guard.skipped) == (8, 1)
    assert [step for step, _ in guard.losses] == list(range(8))


def test_numbers_are_the_same_whether_or_not_anything_waits_for_them(
    tiny_model: Config, tokens: TokenArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a step is not computed yet when it was handed over."""
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    kept = ("step", "lr", "loss", "grad_norm")
    ends = []
    for config in (every(tiny_model, evaluate=2), every(tiny_model, log=2)):
        step_function, writer = fresh(config), Writer()
        train(step_function, tokens, config, writer=writer)
        weights = [{n: v.tolist() for n, v in part.items()} for part in step_function.state_dicts()]
        ends.append(([{name: r[name] for name in kept} for r in writer.records], weights))
    assert ends[0] == ends[1]
    assert [record["step"] for record in ends[0][0]] == [2, 4, 6, 8, 10, 12]


def test_every_step_has_a_dropout_mask_of_its_own(tiny_model: Config, tokens: TokenArray) -> None:
    """The same one for a step whenever it is taken, and another for each. After a rollback a step
    has that of the batch it takes.
    """
    step_function = fresh(tiny_model)

    def keys_from(start: int, batch_offset: int = 0) -> list[str]:
        seen: list[str] = []

        class Recorded(TrainStep):
            def __init__(self) -> None:
                self.__dict__.update(step_function.__dict__)

            def __call__(self, x, y, rate, key, limit=math.inf):  # type: ignore[no-untyped-def]
                seen.append(str(key.tolist()))
                return step_function(x, y, rate, key, limit)

        guard = SpikeGuard(batch_offset=batch_offset)
        train(Recorded(), tokens, tiny_model, start=start, guard=guard)
        return seen

    keys = keys_from(0)
    assert len(set(keys)) == len(keys) == 12
    assert keys_from(5) == keys[5:]
    assert keys_from(2, batch_offset=3)[:7] == keys[5:]


def test_it_stops_after_the_step_it_is_asked_in(tiny_model: Config, tokens: TokenArray) -> None:
    asked, guard = iter([False, False, True]), SpikeGuard()
    config = every(tiny_model)
    stopped = train(fresh(config), tokens, config, stop=lambda: next(asked), guard=guard)
    assert stopped == 3
    assert [step for step, _ in guard.losses] == [0, 1, 2], "the guard has seen the last one too"


@pytest.mark.exact_bits
def test_parts_are_the_whole_bit_for_bit(tiny_model: Config, tokens: TokenArray) -> None:
    """Dropout is on. What is done between steps, here drawing random numbers, changes nothing."""
    whole, parts = fresh(tiny_model), fresh(tiny_model)
    train(whole, tokens, tiny_model)
    start = 0
    for until in (1, 5, 12):
        done = iter(range(start + 1, 100))
        start = train(
            parts,
            tokens,
            every(tiny_model, log=1),
            start=start,
            writer=Writer(lambda *_: mx.eval(mx.random.normal((3,)))),
            stop=lambda until=until, done=done: next(done) == until,
        )
        assert start == until
    for name, value in flatten_params(whole.model.parameters()).items():
        assert (value == flatten_params(parts.model.parameters())[name]).all(), name


def test_a_finished_run_takes_no_step(tiny_model: Config, tokens: TokenArray) -> None:
    step = fresh(tiny_model)
    before = np.array(step.model.wte.weight)
    assert train(step, tokens, tiny_model, start=12) == 12
    assert (np.array(step.model.wte.weight) == before).all()
