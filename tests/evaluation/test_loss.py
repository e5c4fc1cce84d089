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

LETTERS = "äbcdefghijklmnopqr"  # 18 characters, one of them two bytes long


def make_evaluator(
    model: GPT, tokenizer: CharTokenizer, ids: np.ndarray, bos: int | None = None, **options: Any
) -> Evaluator:
    """An evaluator in float32, for token ids below 19."""
    dataset = EvalDataset(TokenArray(ids, 19), tokenizer, bos)
    return Evaluator(model, dataset, compile_eval_step(model, mx.float32), **options)


def total_nats(model: GPT, ids: np.ndarray) -> float:
    """Total loss of ids[1:] in nats, window by window from the logits, in double precision."""
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
def test_every_token_is_evaluated_once_including_the_tail(
    tiny_model: Config, length: int, end_of_text: bool
) -> None:
    tokenizer = CharTokenizer(LETTERS, end_of_text=end_of_text)
    model = GPT(tiny_model.model, 1)
    model.wte.weight = model.wte.weight * 10
    ids = np.random.default_rng(length).integers(0, tokenizer.vocab_size, length)
    ids[-1] = 0  # a letter
    all_ids = np.concatenate([[18], ids]) if end_of_text else ids
    nats = total_nats(model, all_ids)
    predicted_bytes = sum(
        len(tokenizer.token_bytes(i)) for i in all_ids[1:] if i != tokenizer.end_of_text
    )
    for batch_size in (1, 3, 50):
        result = make_evaluator(
            model, tokenizer, ids, tokenizer.end_of_text, batch_size=batch_size
        )()
        assert result.tokens == len(all_ids) - 1
        assert result.loss == pytest.approx(nats / (len(all_ids) - 1), rel=1e-5)
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / predicted_bytes, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_batch_size_is_limited_by_flops_on_metal(
    tiny_model: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread still gets at least one sequence."""
    tokenizer, model = CharTokenizer(LETTERS, end_of_text=False), GPT(tiny_model.model, 1)
    ids = np.arange(300) % 18

    def batch_rows() -> int:
        evaluate = make_evaluator(model, tokenizer, ids, batch_size=12)
        return next(evaluate._batches())[0].shape[0] * execution.thread_count()

    assert batch_rows() == 12
    monkeypatch.setattr(device, "device_type", lambda: "metal")
    assert batch_rows() == 12
    forward = 8 * flops_per_token(tiny_model.model) / 3
    for share, expected in ((4.5, 4), (2.0, 2), (0.1, execution.thread_count())):
        monkeypatch.setattr(device, "MAX_BATCH_FLOPS", share * forward)
        assert batch_rows() == expected


def test_a_uniform_model_has_log2_v_bits_per_byte(tiny_model: Config) -> None:
    model = GPT(tiny_model.model)
    model.wte.weight = mx.zeros_like(model.wte.weight)
    tokenizer = CharTokenizer("abcdefghijklmnopqrs", end_of_text=False)
    ids = np.arange(100) % 19
    result = make_evaluator(model, tokenizer, ids, batch_size=2)()
    assert result.loss == pytest.approx(math.log(19))
    assert result.bits_per_byte == pytest.approx(math.log2(19)), "a letter is a byte here"
    assert result.perplexity == pytest.approx(19)


def test_short_texts_and_invalid_ids_are_refused(tiny_model: Config) -> None:
    tokenizer = CharTokenizer(LETTERS, end_of_text=False)
    model = GPT(tiny_model.model)
    with pytest.raises(UserError, match="too short"):
        make_evaluator(model, tokenizer, np.array([1]), batch_size=1)
    with pytest.raises(UserError, match="id 19"):
        make_evaluator(model, tokenizer, np.array([1, 19]), batch_size=1)


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("limit", [1, 8, 30, 55, 99, 1000])
def test_a_sample_consists_of_windows_spread_over_the_text(
    tiny_model: Config, limit: int, bos: int | None
) -> None:
    T = tiny_model.model.block_size
    tokenizer = CharTokenizer(LETTERS, end_of_text=False)
    model = GPT(tiny_model.model, 1)
    model.wte.weight = model.wte.weight * 10
    ids = np.random.default_rng(limit).integers(0, tokenizer.vocab_size, 100)
    result = make_evaluator(model, tokenizer, ids, bos, batch_size=3, limit=limit)()
    all_ids = ids if bos is None else np.concatenate([[bos], ids])
    windows = math.ceil((len(all_ids) - 1) / T)
    count = min(windows, math.ceil(limit / T))
    sampled = [all_ids[T * n : T * n + T + 1] for n in (k * windows // count for k in range(count))]
    assert result.tokens == sum(len(window) - 1 for window in sampled)
    assert (result.tokens == len(all_ids) - 1) == (limit > len(all_ids) - 1 - T), (
        "all, the tail included"
    )
    nats = sum(total_nats(model, window) for window in sampled)
    byte_count = sum(len(tokenizer.token_bytes(i)) for window in sampled for i in window[1:])
    assert result.loss == pytest.approx(nats / result.tokens, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / byte_count, rel=1e-5)
