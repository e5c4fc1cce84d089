from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.config import Config
from mlxgpt.corpus.tokens import Tokens
from mlxgpt.model.gpt import GPT, flat
from mlxgpt.training import trainer
from mlxgpt.training.guard import Guard
from mlxgpt.training.optim import learning_rate_schedule
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
    for name, value in flat(whole.model.parameters()).items():
        assert (value == flat(parts.model.parameters())[name]).all(), name


def test_a_finished_training_takes_no_step(tiny_model: Config, tokens: Tokens) -> None:
    step = fresh(tiny_model)
    before = np.array(step.model.wte.weight)
    assert train(step, tokens, tiny_model, start=12) == 12
    assert (np.array(step.model.wte.weight) == before).all()
