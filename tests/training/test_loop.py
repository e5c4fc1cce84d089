"""The training loop, with a fake writer that records its calls."""

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
    return TokenArray(np.arange(500) * 7 % 19, 19)  # each token determines the next one


def with_intervals(
    config: Config, *, save: int = NEVER, evaluate: int = NEVER, log: int = NEVER
) -> Config:
    intervals = {"save_interval": save, "eval_interval": evaluate, "log_interval": log}
    return override_config(config, intervals)


def make_step(config: Config) -> TrainStep:
    return TrainStep(GPT(config.model, 1), config)


class FakeWriter:
    """Fake of RunWriter and of evaluation that records calls.

    Args:
        after: called with the name of each call and the step.
    """

    def __init__(self, after: Any = lambda name, step: None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.step_metrics: list[StepMetrics] = []
        self.records: list[dict[str, Any]] = []
        self.rolled_back: list[int] = []
        self.run = self
        self._after = after
        self.is_out_of_patience = False

    def _record(self, name: str, step: int) -> None:
        self.calls.append((name, step))
        self._after(name, step)

    def save(self, step: int, metrics: StepMetrics, guard: SpikeGuard) -> None:
        self.step_metrics.append(metrics)
        self._record("save", step)

    def __call__(self, step: int) -> tuple[None, None, None]:
        """Validate."""
        self._record("evaluate", step)
        return None, None, None

    def evaluate_base(self) -> None:
        """There is no base model."""

    def add_evaluation(self, metrics: StepMetrics, *evaluations: None) -> None:
        self.step_metrics.append(metrics)

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._record("log", record["step"])

    def save_snapshot(self, step: int) -> None:
        self._record("snapshot", step)

    def has_failed(self) -> bool:
        return False

    def scheduled_checkpoint_steps(self) -> list[int]:
        return [step for name, step in self.calls if name == "save"]

    def finish(self, step: int, guard: SpikeGuard) -> None:
        """There is nothing to finish."""

    def truncate_after(self, step: int) -> None:
        self.rolled_back.append(step)

    def log_rollback(self, step: int, spiked: int) -> None:
        """The history is not recorded."""


class StoppableGroup(LocalGroup):
    """A group that calls `stop` after each step."""

    def __init__(self, stop: Any) -> None:
        super().__init__()
        self._stop = stop

    def should_stop(self, stop_requested: bool) -> bool:
        return bool(self._stop())


def train(
    step_function: Any,
    tokens: TokenArray,
    config: Config,
    *,
    writer: FakeWriter | None = None,
    stop: Any = lambda: False,
    start: int = 0,
    guard: SpikeGuard | None = None,
) -> int:
    """Run the training loop with the given step function and writer; return the last step."""
    writer = writer or FakeWriter()
    start_state = StartState(start, guard or SpikeGuard(), None, None)
    dataset: Any = SimpleNamespace(
        train=tokens, folder=Path("data"), tokens_per_step=lambda _: config.tokens_per_step
    )
    job = TrainJob(config, dataset, Path("run"), None, NO_ESTIMATE)
    if not isinstance(step_function, TrainStep):
        step_function.config = config

    @contextmanager
    def resume_or_create(*_: object) -> Iterator[tuple[FakeWriter, StartState]]:
        yield writer, start_state

    def summary(run: FakeWriter, dataset: Any, step: int, **_: Any) -> TrainingSummary:
        return TrainingSummary.for_non_main_rank(
            Path("run"), Path("data"), step, config.train.max_steps
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", lambda *_: step_function)
        patch.setattr(loop, "resume_or_create_run", resume_or_create)
        patch.setattr(loop, "RunWriter", lambda *_: nullcontext(writer))
        patch.setattr(loop, "Validation", lambda *_: writer)
        patch.setattr(TrainingSummary, "from_run", summary)
        return loop.run_training_loop(job, StoppableGroup(stop), Callback()).step


def test_saves_evaluations_and_logs_come_in_order(tiny_model: Config, tokens: TokenArray) -> None:
    """All of them are due after the last step."""
    writer = FakeWriter()
    config = with_intervals(tiny_model, save=6, evaluate=4, log=5)
    assert train(make_step(config), tokens, config, writer=writer) == 12
    names = ("save", "evaluate", "log")
    assert writer.calls == [
        ("snapshot", 0),
        *((name, 4) for name in names),
        ("log", 5),
        ("save", 6),
        *((name, 8) for name in names),
        ("log", 10),
        *((name, 12) for name in names),
    ]


def test_step_metrics(tiny_model: Config, tokens: TokenArray) -> None:
    learning_rate, writer = learning_rate_schedule(tiny_model), FakeWriter()
    config = with_intervals(tiny_model, save=1)
    train(make_step(config), tokens, config, writer=writer)
    metrics_by_step = list({m.step: m for m in writer.step_metrics}.values())
    assert [m.step for m in metrics_by_step] == list(range(1, 13))
    assert [m.lr for m in metrics_by_step] == [float(learning_rate(n)) for n in range(12)]
    assert metrics_by_step[0].loss == pytest.approx(np.log(19), rel=0.05)
    assert metrics_by_step[-1].loss < metrics_by_step[0].loss
    assert all(m.grad_norm > 0 for m in metrics_by_step)
    assert all(a.seconds <= b.seconds for a, b in pairwise(metrics_by_step))


def test_evaluations_and_saves_do_not_count_as_training_time(
    tiny_model: Config, tokens: TokenArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def advance_clock(name: str, step: int) -> None:
        now[0] += 100

    writer = FakeWriter(advance_clock)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    config = with_intervals(tiny_model, save=3)
    train(make_step(config), tokens, config, writer=writer)
    assert [m.seconds for m in {m.step: m for m in writer.step_metrics}.values()] == [0.0] * 4


class FakeDevice:
    """Fake GPU that computes submitted steps only when waited for, each in one second. It replaces
    the step function, its results, MLX's functions and the clock.

    Args:
        stop_step: step after which the loop should stop.
        blocks: whether a step is computed before the call returns, as on a CPU.
    """

    config: Config

    def __init__(self, stop_step: int, blocks: bool) -> None:
        self.blocks = blocks
        self.calls: list[tuple[str, int]] = []
        self.stop_step, self.submitted, self.computed = stop_step, 0, 0

    @property
    def state(self) -> int:
        return self.submitted

    def state_dicts(self) -> tuple[dict, dict]:
        return {}, {}

    def __call__(self, *_: object) -> tuple[LazyScalar, LazyScalar]:
        self.submitted += 1
        self.calls.append(("step", self.submitted))
        if self.blocks:
            self.wait(self.submitted)
        return (LazyScalar(self, self.submitted),) * 2

    def wait(self, step: int) -> None:
        self.computed = max(self.computed, step)

    def stop(self) -> bool:
        return self.submitted == self.stop_step

    def replace_mlx(self, patch: pytest.MonkeyPatch) -> None:
        fake_mx = SimpleNamespace(
            array=mx.array, random=mx.random, async_eval=lambda *_: None, eval=self.wait
        )
        patch.setattr(loop, "mx", fake_mx)
        patch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: float(self.computed)))


class LazyScalar:
    """A loss or norm whose value is the step's number; reading it waits for the step."""

    def __init__(self, device: FakeDevice, step: int) -> None:
        self.device, self.step = device, step

    def __float__(self) -> float:
        self.device.wait(self.step)
        return float(self.step)


intervals = st.integers(1, 13)


@pytest.mark.parametrize("blocks", [False, True])
@given(log=intervals, save=intervals, evaluate=intervals, until=intervals)
def test_a_step_is_logged_after_the_next_is_submitted(
    tiny_model: Config, blocks: bool, log: int, save: int, evaluate: int, until: int
) -> None:
    """Only calls that need the weights wait for the device; order and values do not change."""
    device = FakeDevice(until, blocks)

    def record_call(name: str, step: int) -> None:
        device.calls.append((name, step))
        if name in ("save", "evaluate"):
            assert device.computed == device.submitted == step, "the weights are its step's"

    writer = FakeWriter(record_call)
    tokens = TokenArray(np.arange(500) * 7 % 19, 19)
    config = with_intervals(tiny_model, save=save, evaluate=evaluate, log=log)
    with pytest.MonkeyPatch.context() as patch:
        device.replace_mlx(patch)
        last_step = train(device, tokens, config, writer=writer, stop=device.stop)
    assert last_step == min(until, 12)
    expected: list[tuple[str, int]] = [("snapshot", 0)]
    deferred: list[tuple[str, int]] = []
    for step in range(1, last_step + 1):
        is_evaluated = step % evaluate == 0 or step == 12
        due = {
            "save": is_evaluated or step % save == 0,
            "evaluate": is_evaluated,
            "log": is_evaluated or step % log == 0,
        }
        names = [(name, step) for name, is_due in due.items() if is_due]
        expected += [("step", step), *deferred]
        is_blocking = due["save"]
        expected += names if is_blocking else []
        deferred = [] if is_blocking else names
    assert device.calls == expected + deferred
    assert all(m.loss == m.step for m in writer.step_metrics)
    assert all(m.seconds == m.step - 1 for m in writer.step_metrics), "a second each"
    rates = [record["tokens_per_second"] for record in writer.records]
    assert all(rate in (0.0, config.tokens_per_step) for rate in rates), "a second each"


@pytest.mark.parametrize("name", ["save", "log"])
@pytest.mark.parametrize("interval", [1, 9, 10, 13])
def test_spikes_do_not_depend_on_when_losses_are_read(
    tiny_model: Config,
    tokens: TokenArray,
    interval: int,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses from step 9 on are above the limit; the guard records none of the later steps."""

    class Stop(Exception):
        pass

    class Strict(SpikeGuard):
        def loss_limit(self, step: int) -> float:
            return 8.5

    def roll_back(results: loop.StepResultHandler) -> int:
        raise Stop

    device, guard, writer = FakeDevice(13, blocks=False), Strict("rollback"), FakeWriter()
    writer.calls.append(("save", 1))  # a checkpoint to roll back to
    device.replace_mlx(monkeypatch)
    monkeypatch.setattr(loop.StepResultHandler, "roll_back", roll_back)
    with pytest.raises(Stop):
        train(
            device,
            tokens,
            with_intervals(tiny_model, **{name: interval}),
            guard=guard,
            writer=writer,
        )
    assert (guard.spike_step, guard.skipped) == (8, 1)
    assert [step for step, _ in guard.losses] == list(range(8))


def test_metrics_do_not_depend_on_when_they_are_read(
    tiny_model: Config, tokens: TokenArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a submitted step is computed later."""
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    keys = ("step", "lr", "loss", "grad_norm")
    results = []
    for config in (with_intervals(tiny_model, evaluate=2), with_intervals(tiny_model, log=2)):
        step_function, writer = make_step(config), FakeWriter()
        train(step_function, tokens, config, writer=writer)
        weights = [
            {parameter_name: value.tolist() for parameter_name, value in state_dict.items()}
            for state_dict in step_function.state_dicts()
        ]
        results.append(([{name: r[name] for name in keys} for r in writer.records], weights))
    assert results[0] == results[1]
    assert [record["step"] for record in results[0][0]] == [2, 4, 6, 8, 10, 12]


def test_every_step_has_a_different_dropout_key(tiny_model: Config, tokens: TokenArray) -> None:
    """The key of a step is the same after resuming, and follows the batch after a rollback."""
    step_function = make_step(tiny_model)

    def keys_from(start: int, batch_offset: int = 0) -> list[str]:
        recorded_keys: list[str] = []

        class RecordingStep(TrainStep):
            def __init__(self) -> None:
                self.__dict__.update(step_function.__dict__)

            def __call__(self, batch, rate, key, limit=math.inf):  # type: ignore[no-untyped-def]
                recorded_keys.append(str(key.tolist()))
                return step_function(batch, rate, key, limit)

        guard = SpikeGuard(batch_offset=batch_offset)
        train(RecordingStep(), tokens, tiny_model, start=start, guard=guard)
        return recorded_keys

    keys = keys_from(0)
    assert len(set(keys)) == len(keys) == 12
    assert keys_from(5) == keys[5:]
    assert keys_from(2, batch_offset=3)[:7] == keys[5:]


def test_training_stops_after_the_requested_step(tiny_model: Config, tokens: TokenArray) -> None:
    stop_requests, guard = iter([False, False, True]), SpikeGuard()
    config = with_intervals(tiny_model)
    last_step = train(
        make_step(config), tokens, config, stop=lambda: next(stop_requests), guard=guard
    )
    assert last_step == 3
    assert [step for step, _ in guard.losses] == [0, 1, 2], "the guard has seen the last one too"


@pytest.mark.exact_bits
def test_resuming_the_loop_is_bit_exact(tiny_model: Config, tokens: TokenArray) -> None:
    """With dropout, and with random numbers drawn between steps."""
    uninterrupted, resumed = make_step(tiny_model), make_step(tiny_model)
    train(uninterrupted, tokens, tiny_model)
    start = 0
    for stop_step in (1, 5, 12):
        steps = iter(range(start + 1, 100))
        start = train(
            resumed,
            tokens,
            with_intervals(tiny_model, log=1),
            start=start,
            writer=FakeWriter(lambda *_: mx.eval(mx.random.normal((3,)))),
            stop=lambda stop_step=stop_step, steps=steps: next(steps) == stop_step,
        )
        assert start == stop_step
    for name, value in flatten_params(uninterrupted.model.parameters()).items():
        assert (value == flatten_params(resumed.model.parameters())[name]).all(), name


def test_a_finished_run_does_no_steps(tiny_model: Config, tokens: TokenArray) -> None:
    step = make_step(tiny_model)
    before = np.array(step.model.wte.weight)
    assert train(step, tokens, tiny_model, start=12) == 12
    assert (np.array(step.model.wte.weight) == before).all()
