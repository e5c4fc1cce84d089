from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.config import Config, override_config, toml
from mlxgpt.data.dataset import open_dataset
from mlxgpt.evaluation import loss
from mlxgpt.storage import run as runs
from mlxgpt.training import validation
from mlxgpt.training.validation import (
    EVAL_TOKEN_SHARE,
    MIN_EVAL_TOKENS,
    count_eval_tokens,
    count_final_eval_tokens,
)

counts = st.integers(1, 10**6)


@given(counts, counts, st.integers(1, 10**9), st.integers(0, 10**6))
def test_evaluation_tokens_are_limited_by_training_tokens(
    steps: int, eval_interval: int, val_tokens: int, eval_tokens: int
) -> None:
    config = override_config(
        Config(), {"max_steps": steps, "eval_interval": eval_interval, "eval_tokens": eval_tokens}
    )
    tokens_per_eval, final_tokens = (
        count_eval_tokens(config, val_tokens),
        count_final_eval_tokens(config, val_tokens),
    )
    assert 1 <= tokens_per_eval <= final_tokens <= val_tokens
    share_tokens = EVAL_TOKEN_SHARE * min(steps, eval_interval) * config.tokens_per_step
    if eval_tokens:
        assert tokens_per_eval == min(val_tokens, eval_tokens)
    else:
        assert tokens_per_eval == min(val_tokens, max(MIN_EVAL_TOKENS, math.floor(share_tokens)))
        assert (tokens_per_eval == val_tokens) == (
            val_tokens <= max(MIN_EVAL_TOKENS, math.floor(share_tokens))
        )
    assert final_tokens == val_tokens or final_tokens <= max(
        MIN_EVAL_TOKENS, EVAL_TOKEN_SHARE * steps * config.tokens_per_step, eval_tokens
    )


def test_tier_1_evaluates_the_whole_validation_text() -> None:
    for recipe in ("classic", "modern"):
        assert count_eval_tokens(toml.load_tier_config(1, recipe), 111_540) == 111_540


@pytest.fixture
def tokens_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each evaluation, without the usual minimum."""
    monkeypatch.setattr(validation, "MIN_EVAL_TOKENS", 1)
    counts: list[int] = []
    call = loss.Evaluator.__call__

    def count_tokens(self: loss.Evaluator) -> loss.Evaluation:
        result = call(self)
        counts.append(result.tokens)
        return result

    monkeypatch.setattr(validation.Evaluator, "__call__", count_tokens)
    return counts


@pytest.mark.usefixtures("no_check")
def test_the_final_evaluation_reads_more_tokens(train: Any, tokens_read: list[int]) -> None:
    summary = train("a", eval_tokens=16)
    val_tokens = len(open_dataset(summary.data).val.ids)
    run = runs.open_run(Path("runs/a"))
    eval_counts = [line["val_tokens"] for line in run.metrics() if "val_tokens" in line]
    final_tokens = count_final_eval_tokens(run.config, val_tokens)
    assert 16 < final_tokens < val_tokens
    assert eval_counts == [16, 16, pytest.approx(final_tokens, abs=8)]
    assert tokens_read[-2:] == [16, eval_counts[-1]], (
        "both at the end, so that the best is found fairly"
    )


@pytest.mark.usefixtures("no_check")
def test_the_best_checkpoint_is_chosen_on_the_same_sample(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss on the larger final sample is not comparable with earlier ones."""
    monkeypatch.setattr(validation, "MIN_EVAL_TOKENS", 1)
    losses = iter([3.0, 2.0, *(1.0, 9.0)])  # two evaluations after the last step
    monkeypatch.setattr(
        validation.Evaluator,
        "__call__",
        lambda self: loss.Evaluation(next(losses), 1.0, 1.0, self.tokens),
    )
    monkeypatch.setattr("mlxgpt.training.estimate._time_eval_token", lambda *_: 1e-6)
    summary = train("a", eval_tokens=16)
    assert (summary.best_step, summary.val_loss) == (12, 9.0)
