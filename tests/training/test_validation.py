from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.config import Config, override, toml
from mlxgpt.data.dataset import open_dataset
from mlxgpt.evaluation import loss
from mlxgpt.storage import run as runs
from mlxgpt.training import validation
from mlxgpt.training.validation import LEAST, SHARE, tokens_at_end, tokens_each

counts = st.integers(1, 10**6)


@given(counts, counts, st.integers(1, 10**9), st.integers(0, 10**6))
def test_evaluations_read_a_share_of_what_is_trained_on(
    steps: int, every: int, there: int, asked: int
) -> None:
    config = override(Config(), {"max_steps": steps, "eval_interval": every, "eval_tokens": asked})
    each, at_end = tokens_each(config, there), tokens_at_end(config, there)
    assert 1 <= each <= at_end <= there
    between = SHARE * min(steps, every) * config.tokens_per_step
    if asked:
        assert each == min(there, asked)
    else:
        assert each == min(there, max(LEAST, math.floor(between)))
        assert (each == there) == (there <= max(LEAST, math.floor(between)))
    assert at_end == there or at_end <= max(LEAST, SHARE * steps * config.tokens_per_step, asked)


def test_tier_1_reads_its_whole_validation_text_each_time() -> None:
    for recipe in ("classic", "modern"):
        assert tokens_each(toml.tier(1, recipe), 111_540) == 111_540


@pytest.fixture
def some(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Evaluations during training read two windows, and the one at the end four; what they read."""
    monkeypatch.setattr(validation, "LEAST", 1)
    read: list[int] = []
    call = loss.Evaluator.__call__

    def counted(self: loss.Evaluator) -> loss.Evaluation:
        result = call(self)
        read.append(result.tokens)
        return result

    monkeypatch.setattr(validation.Evaluator, "__call__", counted)
    return read


@pytest.mark.usefixtures("no_check")
def test_a_sample_on_the_way_and_more_at_the_end(train: Any, some: list[int]) -> None:
    summary = train("a", eval_tokens=16)
    there = len(open_dataset(summary.data).val.ids)
    run = runs.open_run(Path("runs/a"))
    each = [line["val_tokens"] for line in run.metrics() if "val_tokens" in line]
    at_end = tokens_at_end(run.config, there)
    assert 16 < at_end < there
    assert each == [16, 16, pytest.approx(at_end, abs=8)]
    assert some[-2:] == [16, each[-1]], "both at the end, so that the best is found fairly"


@pytest.mark.usefixtures("no_check")
def test_the_best_is_judged_by_the_same_sample(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger sample's loss is another number, not a worse model."""
    monkeypatch.setattr(validation, "LEAST", 1)
    losses = iter([3.0, 2.0, *(1.0, 9.0)])  # the last step has two
    monkeypatch.setattr(
        validation.Evaluator,
        "__call__",
        lambda self: loss.Evaluation(next(losses), 1.0, 1.0, self.tokens),
    )
    monkeypatch.setattr("mlxgpt.training.estimate._token_seconds", lambda *_: 1e-6)
    summary = train("a", eval_tokens=16)
    assert (summary.best_step, summary.val_loss) == (12, 9.0)
