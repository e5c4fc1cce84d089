from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxgpt.config import Config, override_config
from mlxgpt.inference.scoring import Scorer
from mlxgpt.model.gpt import GPT
from mlxgpt.utils.errors import UserError

V = 19


@pytest.fixture(scope="module", params=["classic", "modern"])
def model(request: pytest.FixtureRequest, tiny_model: Config) -> GPT:
    """A model with learned and one with rotary positions, with large weights so that predictions
    differ.
    """
    changes: dict[str, Any] = {} if request.param == "classic" else {"position": "rope"}
    model = GPT(override_config(tiny_model, changes).model, seed=3)
    model.update(map_arrays(lambda array: array * 4, model.parameters()))
    return model


def map_arrays(function: Callable[[mx.array], mx.array], tree: Any) -> Any:
    from mlx.utils import tree_map

    return tree_map(function, tree)


@pytest.fixture(scope="module")
def scorer(model: GPT) -> Scorer:
    return Scorer(model, V)


@settings(max_examples=20)
@given(ids=st.lists(st.integers(0, V - 1), min_size=1, max_size=40), count=st.sampled_from([0, 3]))
def test_token_scores_match_the_logits_of_the_model(
    model: GPT, scorer: Scorer, ids: list[int], count: int
) -> None:
    block = model.config.block_size
    scores = [score for portion in scorer(np.array(ids), count) for score in portion]
    assert [score.id for score in scores] == ids[1:]
    last = max(0, len(ids) - 1 - block)
    starts = [0, *sorted(range(last, 0, -(block // 2)))]
    windows = [np.array(model(mx.array([ids[at : at + block]]))[0]) for at in starts]
    for n, score in enumerate(scores, 1):
        window_index = next(k for k, start in enumerate(starts) if n <= start + block)
        position = n - starts[window_index]
        assert position >= min(n, block // 2), "what it is predicted from"
        logits = windows[window_index][position - 1].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        assert score.logprob == pytest.approx(expected[ids[n]], abs=1e-3)
        assert len(score.alternatives) == count
        for id, logprob in score.alternatives:
            assert logprob == pytest.approx(expected[id], abs=1e-3)
        values = [logprob for _, logprob in score.alternatives]
        assert values == pytest.approx(np.sort(expected)[::-1][:count], abs=1e-3)
        assert all(logprob == score.logprob for id, logprob in score.alternatives if id == ids[n])


@pytest.mark.usefixtures("compiler")
def test_scoring_is_compiled_for_few_lengths(
    tiny_model: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPT(override_config(tiny_model, {"block_size": 128}).model)
    lengths: list[int] = []
    original = GPT.__call__

    def tracing_call(self: GPT, ids: mx.array, *args: Any) -> mx.array:
        lengths.append(ids.shape[1])
        return original(self, ids, *args)

    monkeypatch.setattr(GPT, "__call__", tracing_call)
    scorer = Scorer(model, V)
    for length in (2, 3, 16, 17, 18, 40, 128, 129, 130, 300):
        list(scorer(np.zeros(length, dtype=np.int64)))
    assert lengths == [16, 32, 48, 128]


def test_ids_without_a_token_have_no_probability(model: GPT) -> None:
    (portion,) = Scorer(model, 7)(np.array([1, 2, 3]), 99)
    for score in portion:
        assert sorted(id for id, _ in score.alternatives) == list(range(7))
        assert sum(np.exp(value) for _, value in score.alternatives) == pytest.approx(1, abs=1e-5)


def test_nonfinite_logits_are_an_error(tiny_model: Config) -> None:
    model = GPT(tiny_model.model)
    model.update({"ln_f": {"weight": mx.full((16,), float("nan"))}})
    with pytest.raises(UserError, match="not finite"):
        list(Scorer(model, V)(np.array([1, 2])))
