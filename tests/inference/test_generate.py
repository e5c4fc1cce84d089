from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import ANY

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.config import Config, SamplingParams, override_config
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.inference import generate
from mlxgpt.inference.engine import CompiledModel
from mlxgpt.inference.generate import (
    Detokenizer,
    GenerationOutput,
    TextStream,
    TokenOutput,
    prepend_bos,
)
from mlxgpt.model.gpt import GPT
from mlxgpt.utils.errors import UserError
from tests.helpers.tiny_models import make_random_model

LETTERS = "abcdefghijklmnopqr\n"  # 19 characters


@pytest.fixture(scope="module")
def tokenizer() -> CharTokenizer:
    return CharTokenizer(LETTERS, end_of_text=False)


@pytest.fixture(scope="module")
def model(tiny_model: Config) -> GPT:
    return make_random_model(tiny_model)


class ScriptedModel(GPT):
    """A model that repeats a fixed sequence of ids, depending only on the position."""

    def __init__(self, config: Config, ids: list[int]) -> None:
        super().__init__(config.model)
        self._ids = mx.array([int(id) for id in ids])

    def __call__(self, ids, cache, *, last=None):  # type: ignore[no-untyped-def]
        if cache.position is None:
            super().__call__(ids, cache, last=last)
            return self._next_logits(last, len(ids))
        return self._next_logits(cache.position, len(ids))[:, None]

    def _next_logits(self, position: mx.array, rows: int) -> mx.array:
        next_ids = mx.take(self._ids, position % len(self._ids))[:, None]
        logits = mx.where(mx.arange(self.config.vocab_size) == next_ids, 0.0, -1e9)
        return mx.broadcast_to(logits, (rows, self.config.vocab_size))


def stream_text(
    model: GPT, tokenizer: CharTokenizer, prompts: str | list[str], sampling: SamplingParams
) -> tuple[list[str], GenerationOutput]:
    """Generate text, with end-of-text as BOS if the tokenizer has it; return pieces and result."""
    compiled, bos = CompiledModel(model, tokenizer.vocab_size), tokenizer.end_of_text
    prompts = [prompts] if isinstance(prompts, str) else prompts
    stream = TextStream(compiled, tokenizer, prompts, sampling, bos=bos)
    return [stream.prompt, *stream], stream.result


def generate_text(
    model: GPT, tokenizer: CharTokenizer, prompts: str | list[str], sampling: SamplingParams
) -> GenerationOutput:
    return stream_text(model, tokenizer, prompts, sampling)[1]


def test_greedy_text_is_the_argmax_of_a_full_forward_pass(
    model: GPT, tokenizer: CharTokenizer
) -> None:
    """Beyond the block size the context is the last half block and the tokens after it."""
    ids = tokenizer.encode("ab").tolist()
    block = model.config.block_size
    expected, window = list(ids), list(ids)
    for _ in range(40):
        if len(window) > block:
            window = window[-(block // 2) :]
        next_id = int(model(mx.array([window]))[0, -1].argmax())
        expected.append(next_id)
        window.append(next_id)
    result = generate_text(model, tokenizer, "ab", SamplingParams(temperature=0, max_tokens=40))
    assert tokenizer.encode(result.texts[0]).tolist() == expected
    assert result.tokens == 40


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_max_tokens_within_and_beyond_the_block(
    model: GPT, tokenizer: CharTokenizer, length: int
) -> None:
    for prompt in ("", "a", "abcdefg", "abcdefgh", "abcdefghij" * 3):
        result = generate_text(model, tokenizer, prompt, SamplingParams(max_tokens=length, seed=1))
        assert len(result.texts[0]) == len(prompt) + length
        assert result.texts[0].startswith(prompt), "the prompt is part of the text"
        assert result.ended == [False]


def test_the_same_seed_gives_the_same_text(model: GPT, tokenizer: CharTokenizer) -> None:
    def text(**settings: object) -> list[str]:
        sampling = SamplingParams(max_tokens=30, **settings)  # type: ignore[arg-type]
        return generate_text(model, tokenizer, "ab", sampling).texts

    assert text(seed=5) == text(seed=5) != text(seed=6)
    unseeded = generate_text(model, tokenizer, "ab", SamplingParams(max_tokens=30))
    assert unseeded.texts == text(seed=unseeded.seed), "a fresh seed is told, and makes it again"


def test_every_token_is_sampled_with_a_new_key(
    tiny_model: Config, tokenizer: CharTokenizer
) -> None:

    class UniformModel(GPT):
        def __call__(self, ids, cache, *, last=None):  # type: ignore[no-untyped-def]
            return mx.zeros_like(super().__call__(ids, cache, last=last))

    model = UniformModel(override_config(tiny_model, {"block_size": 64}).model)
    text = generate_text(model, tokenizer, "", SamplingParams(max_tokens=40, seed=0)).texts[0]
    assert len(set(text)) > 10


def test_samples_in_a_batch_differ_and_start_with_the_prompt(
    model: GPT, tokenizer: CharTokenizer
) -> None:
    result = generate_text(model, tokenizer, "ab", SamplingParams(max_tokens=30, samples=5, seed=1))
    assert len(set(result.texts)) == 5
    assert all(text.startswith("ab") and len(text) == 32 for text in result.texts)
    assert result.tokens == 150


def test_a_long_prompt_is_truncated_with_a_warning(
    model: GPT, tokenizer: CharTokenizer, notes: list[str]
) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=1)
    outputs = []
    for prompt in ("q" * 9 + "abcdefgh", "abcdefgh"):
        stream = TextStream(CompiledModel(model, 19), tokenizer, [prompt], sampling, bos=None)
        outputs.append("".join(stream))
        stream.log_long_texts()
    assert outputs[0] == outputs[1] != ""
    forgotten_note = "the text is longer than the block size of 8 tokens: the model only sees "
    forgotten_note += "the last 4 to 8"
    assert notes == [
        "the prompt has 17 tokens; the model only sees the last 8",
        forgotten_note,
        forgotten_note,
    ]


def test_unknown_characters_are_refused(model: GPT, tokenizer: CharTokenizer) -> None:
    with pytest.raises(UserError, match="'X'"):
        generate_text(model, tokenizer, "aXb", SamplingParams())


def test_prepend_bos(tokenizer: CharTokenizer) -> None:
    assert tokenizer.decode(prepend_bos(tokenizer.encode(""), tokenizer, None)) == "\n"
    assert tokenizer.decode(prepend_bos(tokenizer.encode("ab"), tokenizer, None)) == "ab"
    with_end = CharTokenizer("ab", end_of_text=True)
    assert prepend_bos(with_end.encode(""), with_end, 2).tolist() == [2]
    assert prepend_bos(with_end.encode("b"), with_end, 2).tolist() == [2, 1]
    # As in GPT-2: end-of-text only before an empty prompt.
    assert prepend_bos(with_end.encode(""), with_end, None).tolist() == [2]
    assert prepend_bos(with_end.encode("b"), with_end, None).tolist() == [1]


def test_streamed_pieces_add_up_to_the_text(model: GPT, tokenizer: CharTokenizer) -> None:
    sampling = SamplingParams(max_tokens=20, seed=1, stop=("zzz",))
    pieces, result = stream_text(model, tokenizer, "ab", sampling)
    assert "".join(pieces) == result.texts[0]
    assert len([piece for piece in pieces if piece]) == 21, "each as it is generated"


def test_a_stream_generates_only_as_far_as_it_is_read(model: GPT, tokenizer: CharTokenizer) -> None:
    compiled = CompiledModel(model, tokenizer.vocab_size)
    stream = TextStream(
        compiled, tokenizer, ["ab"], SamplingParams(max_tokens=20, seed=1), bos=None
    )
    assert stream.result == GenerationOutput(["ab"], 1, 0, 0.0, [False])
    for n, piece in enumerate(stream, 1):
        assert stream.result.texts[0].endswith(piece)
        assert stream.result.tokens == n


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("ef",), "abcd"),
        (("x", "def"), "abc"),
        (("de", "cd"), "ab"),  # the earliest in the text wins
        (("d", "cd"), "ab"),  # also if both end at the same character
        (("fgz",), "abcdefghab"),  # a partial match is part of the text
        (("",), "abcdefghab"),
    ],
)
def test_generation_stops_before_a_stop_string(
    tiny_model: Config, tokenizer: CharTokenizer, stop: tuple[str, ...], expected: str
) -> None:
    scripted = ScriptedModel(
        override_config(tiny_model, {"block_size": 64}), list(tokenizer.encode("abcdefgh"))
    )
    pieces, result = stream_text(
        scripted, tokenizer, "", SamplingParams(max_tokens=10, stop=stop, seed=0)
    )
    assert result.texts == [expected]
    assert "".join(pieces) == expected


def test_generation_stops_at_end_of_text(tiny_model: Config) -> None:
    tokenizer = CharTokenizer(LETTERS[:18], end_of_text=True)
    assert tokenizer.end_of_text == 18
    ids = [*tokenizer.encode("abc"), tokenizer.end_of_text]
    scripted = ScriptedModel(override_config(tiny_model, {"block_size": 64}), ids)
    result = generate_text(
        scripted, tokenizer, "", SamplingParams(max_tokens=50, samples=2, seed=0)
    )
    assert result.texts == ["abc", "abc"]
    assert result.ended == [True, True]
    assert result.tokens == 8


def test_multibyte_characters_are_not_split() -> None:
    class ByteTokenizer:
        end_of_text = None

        def token_bytes(self, id: int) -> bytes:
            return bytes([id])

    detokenizer = Detokenizer(ByteTokenizer(), "", ())  # type: ignore[arg-type]
    pieces = [detokenizer.add_token(byte) for byte in "é🙂".encode()]
    assert pieces == ["", "é", "", "", "", "🙂"]
    assert detokenizer.add_token(0xC3) == ""
    assert detokenizer.finalize() == "\N{REPLACEMENT CHARACTER}"


def test_ids_beyond_the_tokenizer_are_never_sampled(model: GPT) -> None:
    small_tokenizer = CharTokenizer("abc", end_of_text=False)
    result = generate_text(
        model, small_tokenizer, "ab", SamplingParams(max_tokens=60, temperature=5.0, seed=0)
    )
    assert set(result.texts[0]) == set("abc")


def test_prompts_of_different_lengths_in_one_batch(model: GPT, tokenizer: CharTokenizer) -> None:
    """Each gives the same texts as alone, even if other texts end first."""
    prompts = ["ab", "", "abcdefghij", "q", "ab", "defd"]
    sampling = SamplingParams(max_tokens=20, seed=3, samples=3, stop=("rm", "hh", "ml"), top_p=0.9)
    batched = generate_text(model, tokenizer, prompts, sampling)
    assert len(batched.texts) == len(batched.ended) == 18
    for n, prompt in enumerate(prompts):
        single = generate_text(model, tokenizer, prompt, sampling)
        assert batched.texts[3 * n : 3 * n + 3] == single.texts
        assert batched.ended[3 * n : 3 * n + 3] == single.ended
    assert 0 < sum(batched.ended) < 18, "some end, some do not"
    assert batched.texts[:3] == batched.texts[12:15], "same prompt, same seed, same texts"
    assert len(set(batched.texts[:3])) == 3


def test_more_texts_than_fit_in_a_batch(
    monkeypatch: pytest.MonkeyPatch, model: GPT, tokenizer: CharTokenizer
) -> None:
    sampling = SamplingParams(max_tokens=9, seed=3, samples=2)
    expected = generate_text(model, tokenizer, ["ab", "c", "d"], sampling)
    monkeypatch.setattr(generate, "MAX_BATCH_SIZE", 4)
    pieces, result = stream_text(model, tokenizer, ["ab", "c", "d"], sampling)
    assert result == replace(expected, tokens_per_second=ANY)
    assert "".join(pieces) == expected.texts[0]


def test_stream_tokens(tiny_model: Config) -> None:
    """Each output has the completed characters, and the last one whether the text ended."""
    tokenizer = BPETokenizer([])
    ids = tokenizer.encode("é🙂?").tolist()
    script = [*ids[1:], tokenizer.end_of_text]
    config = override_config(tiny_model, {"vocab_size": 257, "block_size": 16})
    compiled = CompiledModel(ScriptedModel(config, script), tokenizer.vocab_size)

    def stream_outputs(prompt: list[int], **options: Any) -> list[TokenOutput]:
        ids = np.array(prompt)
        return list(generate.stream_tokens(compiled, tokenizer, ids, SamplingParams(**options)))

    outputs = stream_outputs(ids[:1])
    assert [output.id for output in outputs] == script
    assert outputs[0].text == "é"
    outputs = stream_outputs(ids[:3], max_tokens=20)
    assert [output.text for output in outputs] == ["", "", "🙂", "?", ""]
    assert [output.ended for output in outputs] == [False, False, False, False, True]
    assert outputs[0].probability is None
    assert outputs[0].alternatives == []
    outputs = stream_outputs(ids[:2], max_tokens=2)
    assert [output.text for output in outputs] == ["", "\N{REPLACEMENT CHARACTER}"], "cut off"
    outputs = stream_outputs(ids[:2], stop=("?",))
    assert "".join(output.text for output in outputs) == "🙂"
    assert outputs[-1].ended
