from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.config import Config
from mlxgpt.corpus.tokens import Tokens
from mlxgpt.model import GPT, flat
from mlxgpt.optim import learning_rate
from mlxgpt.step import TrainStep
from mlxgpt.trainer import Hook, Report, train


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


def test_reports_say_what_happened(tiny_model: Config, tokens: Tokens) -> None:
    reports: list[Report] = []
    train(fresh(tiny_model), tokens, tiny_model, hooks=[Hook(lambda s: True, reports.append)])
    assert [r.step for r in reports] == list(range(1, 13))
    assert [r.lr for r in reports] == [learning_rate(tiny_model, n) for n in range(12)]
    assert reports[0].loss == pytest.approx(np.log(19), rel=0.05)
    assert reports[-1].loss < reports[0].loss
    assert all(r.grad_norm > 0 for r in reports)
    assert all(a.seconds <= b.seconds for a, b in pairwise(reports))


def test_it_stops_after_the_step_it_is_asked_in(tiny_model: Config, tokens: Tokens) -> None:
    asked = iter([False, False, True])
    assert train(fresh(tiny_model), tokens, tiny_model, stop=lambda: next(asked)) == 3


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
