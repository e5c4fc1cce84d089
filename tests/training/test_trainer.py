from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.backend.cpu import parallel as lanes
from mlxgpt.config import Config
from mlxgpt.corpus.tokens import Tokens
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
from mlxgpt.training import trainer
from mlxgpt.training.guard import Guard
from mlxgpt.training.schedule import learning_rate_schedule
from mlxgpt.training.step import TrainStep
from mlxgpt.training.trainer import Hook, Metrics, train


@pytest.fixture
def tokens() -> Tokens:
    return Tokens(np.arange(500) * 7 % 19, 19)  # every token says which is next


def asked(until: int, done: Iterator[int]) -> bool:
    return next(done) == until


def fresh(config: Config) -> TrainStep:
    return TrainStep(GPT(config.model, 1), config)


def test_hooks_come_in_order_at_the_steps_they_ask_for(tiny_model: Config, tokens: Tokens) -> None:
    calls: list[tuple[str, int]] = []

    def hook(name: str, every: int) -> Hook:
        return Hook(lambda step: step % every == 0, lambda r: calls.append((name, r.step)))

    done = train(fresh(tiny_model), tokens, tiny_model, hooks=[hook("a", 6), hook("b", 4)])
    assert done == 12
    assert calls == [("b", 4), ("a", 6), ("b", 8), ("a", 12), ("b", 12)]


def test_metrics_say_what_happened(tiny_model: Config, tokens: Tokens) -> None:
    learning_rate = learning_rate_schedule(tiny_model)
    seen: list[Metrics] = []
    train(fresh(tiny_model), tokens, tiny_model, hooks=[Hook(lambda s: True, seen.append)])
    assert [r.step for r in seen] == list(range(1, 13))
    assert [r.lr for r in seen] == [float(learning_rate(n)) for n in range(12)]
    assert seen[0].loss == pytest.approx(np.log(19), rel=0.05)
    assert seen[-1].loss < seen[0].loss
    assert all(r.grad_norm > 0 for r in seen)
    assert all(a.seconds <= b.seconds for a, b in pairwise(seen))


def test_what_hooks_do_is_no_time_of_training(
    tiny_model: Config, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, seen = [0.0], []

    def slow(metrics: Metrics) -> None:
        seen.append(metrics.seconds)
        now[0] += 100

    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    train(fresh(tiny_model), tokens, tiny_model, hooks=[Hook(lambda step: step % 3 == 0, slow)])
    assert seen == [0.0] * 4


class Device:
    """In place of a GPU: steps that are handed over, and computed when somebody waits for them,
    each in a second. Stands in for the step function, its numbers, MLX's functions and the clock.

    Args:
        until: the step after which it is to stop.
        blocks: whether a step is computed before the call returns, as on a CPU.
    """

    def __init__(self, until: int, blocks: bool) -> None:
        self.blocks = blocks
        self.calls: list[tuple[str, int]] = []
        self.until, self.handed, self.computed = until, 0, 0

    @property
    def state(self) -> int:
        return self.handed

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
        patch.setattr(trainer, "mx", fake)
        patch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: float(self.computed)))


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
    """Nothing waits for the device but what needs the state; and it all comes in the same order,
    with the same numbers, as if everything waited.
    """
    device = Device(until, blocks)
    seen: list[Metrics] = []

    def hook(name: str, every: int, needs_state: bool = True) -> Hook:
        def run(metrics: Metrics) -> None:
            device.calls.append((name, metrics.step))
            if needs_state:
                assert device.computed == device.handed == metrics.step, "the state is its step's"
            seen.append(metrics)

        return Hook(lambda step: step % every == 0, run, needs_state)

    hooks = [hook("save", save), hook("evaluate", evaluate), hook("log", log, False)]
    tokens = Tokens(np.arange(500) * 7 % 19, 19)
    with pytest.MonkeyPatch.context() as patch:
        device.replace_mlx(patch)
        done = train(device, tokens, tiny_model, hooks=hooks, stop=device.stop)  # type: ignore[arg-type]
    assert done == min(until, 12)
    expected: list[tuple[str, int]] = []
    late: list[tuple[str, int]] = []
    for step in range(1, done + 1):
        due = [
            (name, step)
            for name, n in zip(("save", "evaluate", "log"), (save, evaluate, log), strict=True)
            if step % n == 0
        ]
        expected += [("step", step), *late]
        drains = due[:1] != [("log", step)]
        expected += due if drains else []
        late = [] if drains else due
    assert device.calls == expected + late
    assert [m.loss for m in seen] == [m.step for m in seen]
    assert [m.seconds for m in seen] == [m.step - 1 for m in seen], "a second each"


@pytest.mark.parametrize("needs_state", [True, False])
@pytest.mark.parametrize("every", [1, 9, 10, 13])
def test_a_spike_is_the_same_whoever_waits(
    tiny_model: Config, tokens: Tokens, every: int, needs_state: bool
) -> None:
    """The losses from step 9 on are too large; nothing is remembered of the steps after it."""

    class Strict(Guard):
        def limit(self, step: int) -> float:
            return 8.5

    device, guard = Device(13, blocks=False), Strict("rollback")
    hook = Hook(lambda step: step % every == 0, lambda metrics: None, needs_state)
    with pytest.MonkeyPatch.context() as patch:
        device.replace_mlx(patch)
        train(
            device,  # type: ignore[arg-type]
            tokens,
            tiny_model,
            hooks=[hook],
            guard=guard,
            can_go_back=lambda: True,
        )
    assert (guard.spiked, guard.skipped) == (8, 1)
    assert [step for step, _ in guard.losses] == list(range(8))


def test_numbers_are_the_same_whether_or_not_anything_waits_for_them(
    tiny_model: Config, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a step is not computed yet when it was handed over."""
    monkeypatch.setattr(lanes, "count", lambda: 1)
    ends = []
    for needs_state in (True, False):
        seen: list[tuple[int, float, float, float]] = []

        def note(m: Metrics, seen: list[Any] = seen) -> None:
            seen.append((m.step, m.lr, m.loss, m.grad_norm))

        step_function = fresh(tiny_model)
        train(
            step_function, tokens, tiny_model, hooks=[Hook(lambda s: s % 2 == 1, note, needs_state)]
        )
        weights = [{n: v.tolist() for n, v in part.items()} for part in step_function.arrays()]
        ends.append((seen, weights))
    assert ends[0] == ends[1]
    assert [step for step, *_ in ends[0][0]] == [1, 3, 5, 7, 9, 11]


def test_every_step_has_a_dropout_mask_of_its_own(tiny_model: Config, tokens: Tokens) -> None:
    """The same one for a step whenever it is taken, and another for each. After going back a step
    has that of the batch it takes.
    """
    step_function = fresh(tiny_model)

    def keys_from(start: int, passed: int = 0) -> list[str]:
        seen: list[str] = []

        class Recorded(TrainStep):
            def __init__(self) -> None:
                self.__dict__.update(step_function.__dict__)

            def __call__(self, x, y, rate, key, limit=math.inf):  # type: ignore[no-untyped-def]
                seen.append(str(key.tolist()))
                return step_function(x, y, rate, key, limit)

        train(Recorded(), tokens, tiny_model, start=start, guard=Guard(passed=passed))
        return seen

    keys = keys_from(0)
    assert len(set(keys)) == len(keys) == 12
    assert keys_from(5) == keys[5:]
    assert keys_from(2, passed=3)[:7] == keys[5:]


def test_it_stops_after_the_step_it_is_asked_in(tiny_model: Config, tokens: Tokens) -> None:
    asked, guard = iter([False, False, True]), Guard()
    stopped = train(fresh(tiny_model), tokens, tiny_model, stop=lambda: next(asked), guard=guard)
    assert stopped == 3
    assert [step for step, _ in guard.losses] == [0, 1, 2], "the guard has seen the last one too"


@pytest.mark.exact_bits
def test_parts_are_the_whole_bit_for_bit(tiny_model: Config, tokens: Tokens) -> None:
    """Dropout is on. What hooks do between, here drawing random numbers, changes nothing."""
    whole, parts = fresh(tiny_model), fresh(tiny_model)
    train(whole, tokens, tiny_model)
    start = 0
    for until in (1, 5, 12):
        noise = Hook(lambda s: True, lambda r: mx.eval(mx.random.normal((3,))))
        start = train(
            parts,
            tokens,
            tiny_model,
            start=start,
            hooks=[noise],
            stop=partial(asked, until, iter(range(start + 1, 100))),
        )
        assert start == until
    for name, value in flatten_params(whole.model.parameters()).items():
        assert (value == flatten_params(parts.model.parameters())[name]).all(), name


def test_a_finished_training_takes_no_step(tiny_model: Config, tokens: Tokens) -> None:
    step = fresh(tiny_model)
    before = np.array(step.model.wte.weight)
    assert train(step, tokens, tiny_model, start=12) == 12
    assert (np.array(step.model.wte.weight) == before).all()
