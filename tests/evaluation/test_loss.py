from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.backend import device, execution
from mlxgpt.config import Config
from mlxgpt.data.token_array import TokenArray
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.evaluation.loss import EvalDataset, Evaluator, compile_eval_step
from mlxgpt.model.gpt import GPT
from mlxgpt.model.stats import flops_per_token
from mlxgpt.utils.errors import UserError

LETTERS = "äbcdefghijklmnopqr"  # 18, the last one two bytes long


def evaluator(
    model: GPT, tokenizer: CharTokenizer, ids: np.ndarray, bos: int | None = None, **more: Any
) -> Evaluator:
    """Of a model on ids of 19, in float32."""
    text = EvalDataset(TokenArray(ids, 19), tokenizer, bos)
    return Evaluator(model, text, compile_eval_step(model, mx.float32), **more)


def log_probs(model: GPT, ids: np.ndarray) -> float:
    """Summed nats of ids[1:], window by window, from the logits, in double precision."""
    total, block = 0.0, model.config.block_size
    for start in range(0, len(ids) - 1, block):
        window = ids[start : start + block + 1]
        logits = np.array(model(mx.array(window[None, :-1].astype(np.int32))))[0].astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        log_softmax = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        total -= log_softmax[np.arange(len(window) - 1), window[1:]].sum()
    return total


@pytest.mark.parametrize("length", [2, 8, 9, 10, 16, 17, 33, 100])
@pytest.mark.parametrize("end_of_text", [True, False])
def test_every_token_is_judged_once_the_tail_included(
    tiny_model: Config, length: int, end_of_text: bool
) -> None:
    tokenizer = CharTokenizer(LETTERS, end_of_text=end_of_text)
    model = GPT(tiny_model.model, 1)
    model.wte.weight = model.wte.weight * 10
    ids = np.random.default_rng(length).integers(0, tokenizer.vocab_size, length)
    ids[-1] = 0  # a letter
    whole = np.concatenate([[18], ids]) if end_of_text else ids
    nats = log_probs(model, whole)
    predicted = sum(len(tokenizer.token_bytes(i)) for i in whole[1:] if i != tokenizer.end_of_text)
    for batch_size in (1, 3, 50):
        result = evaluator(model, tokenizer, ids, tokenizer.end_of_text, batch_size=batch_size)()
        assert result.tokens == len(whole) - 1
        assert result.loss == pytest.approx(nats / (len(whole) - 1), rel=1e-5)
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / predicted, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_a_batch_is_bounded_by_its_operations(
    tiny_model: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Metal alone, and there to one sequence at least."""
    tokenizer, model = CharTokenizer(LETTERS, end_of_text=False), GPT(tiny_model.model, 1)
    ids = np.arange(300) % 18

    def rows() -> int:
        evaluate = evaluator(model, tokenizer, ids, batch_size=12)
        return next(evaluate._batches())[0].shape[0] * execution.thread_count()

    assert rows() == 12
    monkeypatch.setattr(device, "device_type", lambda: "metal")
    assert rows() == 12
    forward = 8 * flops_per_token(tiny_model.model) / 3
    for share, expected in ((4.5, 4), (2.0, 2), (0.1, execution.thread_count())):
        monkeypatch.setattr(device, "MAX_BATCH_FLOPS", share * forward)
        assert rows() == expected


def test_a_uniform_model_needs_log2_v_bits(tiny_model: Config) -> None:
    model = GPT(tiny_model.model)
    model.wte.weight = mx.zeros_like(model.wte.weight)
    tokenizer = CharTokenizer("abcdefghijklmnopqrs", end_of_text=False)
    ids = np.arange(100) % 19
    result = evaluator(model, tokenizer, ids, batch_size=2)()
    assert result.loss == pytest.approx(math.log(19))
    assert result.bits_per_byte == pytest.approx(math.log2(19)), "a letter is a byte here"
    assert result.perplexity == pytest.approx(19)


def test_too_short_a_text_and_foreign_ids_are_refused(tiny_model: Config) -> None:
    tokenizer = CharTokenizer(LETTERS, end_of_text=False)
    model = GPT(tiny_model.model)
    with pytest.raises(UserError, match="too short"):
        evaluator(model, tokenizer, np.array([1]), batch_size=1)
    with pytest.raises(UserError, match="id 19"):
        evaluator(model, tokenizer, np.array([1, 19]), batch_size=1)


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("limit", [1, 8, 30, 55, 99, 1000])
def test_a_sample_is_windows_spread_over_the_text(
    tiny_model: Config, limit: int, bos: int | None
) -> None:
    T = tiny_model.model.block_size
    tokenizer = CharTokenizer(LETTERS, end_of_text=False)
    model = GPT(tiny_model.model, 1)
    model.wte.weight = model.wte.weight * 10
    ids = np.random.default_rng(limit).integers(0, tokenizer.vocab_size, 100)
    found = evaluator(model, tokenizer, ids, bos, batch_size=3, limit=limit)()
    whole = ids if bos is None else np.concatenate([[bos], ids])
    windows = math.ceil((len(whole) - 1) / T)
    count = min(windows, math.ceil(limit / T))
    chosen = [whole[T * n : T * n + T + 1] for n in (k * windows // count for k in range(count))]
    assert found.tokens == sum(len(window) - 1 for window in chosen)
    assert (found.tokens == len(whole) - 1) == (limit > len(whole) - 1 - T), (
        "all, the tail included"
    )
    nats = sum(log_probs(model, window) for window in chosen)
    size = sum(len(tokenizer.token_bytes(i)) for window in chosen for i in window[1:])
    assert found.loss == pytest.approx(nats / found.tokens, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
