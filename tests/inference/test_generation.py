from __future__ import annotations

import gc
import weakref
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxgpt.config import Config, Sampling, override
from mlxgpt.corpus.tokenizer import CharTokenizer
from mlxgpt.errors import UserError
from mlxgpt.inference import generation
from mlxgpt.inference.generation import tokens, with_start
from mlxgpt.model.gpt import GPT

LETTERS = "abcdefghijklmnopqr\n"  # 19 of them


@pytest.fixture(scope="module")
def tokenizer() -> CharTokenizer:
    return CharTokenizer(LETTERS, end_of_text=False)


@pytest.fixture(scope="module")
def model(tiny_model: Config) -> GPT:
    """A model that is neither sure nor clueless: large random weights."""
    model = GPT(tiny_model.model)
    draw = np.random.default_rng(0)
    model.update(
        tree_map(
            lambda p: mx.array(draw.normal(0, 0.4, p.shape).astype(np.float32)), model.parameters()
        )
    )
    return model


class Scripted(GPT):
    """A model that writes one text over and over, whatever it reads: token n follows n - 1
    places.
    """

    def __init__(self, config: Config, ids: list[int]) -> None:
        super().__init__(config.model)
        self._ids = mx.array([int(id) for id in ids])

    def cached(self, ids, cache, position, last):  # type: ignore[no-untyped-def]
        next_place = position + last
        chosen = mx.take(self._ids, next_place % len(self._ids))
        row = mx.where(mx.arange(self.config.vocab_size) == chosen, 0.0, -1e9)
        return mx.broadcast_to(row, (ids.shape[0], self.config.vocab_size)), cache


def generated(model: GPT, tokenizer: CharTokenizer, prompt: str, *given: Any, **named: Any) -> Any:
    """As texts of such a tokenizer begin."""
    bos = tokenizer.end_of_text
    return generation.generate(model, tokenizer, prompt, *given, bos=bos, **named)


def test_greedy_text_is_the_argmax_of_the_whole_forward_pass(
    model: GPT, tokenizer: CharTokenizer
) -> None:
    """Up to the block; beyond it, of what the cache holds: the last half and what follows."""
    ids = tokenizer.encode("ab").tolist()
    block = model.config.block_size
    expected, window = list(ids), list(ids)
    for _ in range(40):
        if len(window) > block:
            window = window[-(block // 2) :]
        chosen = int(model(mx.array([window]))[0, -1].argmax())
        expected.append(chosen)
        window.append(chosen)
    found = generated(model, tokenizer, "ab", Sampling(temperature=0, max_tokens=40))
    assert tokenizer.encode(found.texts[0]).tolist() == expected
    assert found.tokens == 40


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_as_many_tokens_as_asked_beyond_the_block_too(
    model: GPT, tokenizer: CharTokenizer, length: int
) -> None:
    for prompt in ("", "a", "abcdefg", "abcdefgh", "abcdefghij" * 3):
        result = generated(model, tokenizer, prompt, Sampling(max_tokens=length, seed=1))
        assert len(result.texts[0]) == len(prompt) + length
        assert result.texts[0].startswith(prompt), "the prompt is part of the text"
        assert result.ended == [False]


def test_same_seed_same_text(model: GPT, tokenizer: CharTokenizer) -> None:
    def text(**settings: object) -> list[str]:
        sampling = Sampling(max_tokens=30, **settings)  # type: ignore[arg-type]
        return generated(model, tokenizer, "ab", sampling).texts

    assert text(seed=5) == text(seed=5) != text(seed=6)
    fresh = generated(model, tokenizer, "ab", Sampling(max_tokens=30))
    assert fresh.texts == text(seed=fresh.seed), "a fresh seed is told, and makes it again"


def test_every_token_is_drawn_anew(tiny_model: Config, tokenizer: CharTokenizer) -> None:
    """With a key of its own: what is drawn of the same probabilities differs."""

    class Clueless(GPT):
        def cached(self, ids, cache, position, last):  # type: ignore[no-untyped-def]
            return mx.zeros((ids.shape[0], self.config.vocab_size)), cache

    model = Clueless(override(tiny_model, {"block_size": 64}).model)
    text = generated(model, tokenizer, "", Sampling(max_tokens=40, seed=0)).texts[0]
    assert len(set(text)) > 10


def test_samples_in_a_batch_differ_and_all_keep_the_prompt(
    model: GPT, tokenizer: CharTokenizer
) -> None:
    result = generated(model, tokenizer, "ab", Sampling(max_tokens=30, samples=5, seed=1))
    assert len(set(result.texts)) == 5
    assert all(text.startswith("ab") and len(text) == 32 for text in result.texts)
    assert result.tokens == 150


def test_a_long_prompt_keeps_its_last_tokens_and_says_so(
    model: GPT, tokenizer: CharTokenizer
) -> None:
    notes: list[str] = []
    sampling = Sampling(temperature=0, max_tokens=1)
    long = generated(model, tokenizer, "q" * 9 + "abcdefgh", sampling, note=notes.append)
    short = generated(model, tokenizer, "abcdefgh", sampling, note=notes.append)
    assert long.texts[0][-1] == short.texts[0][-1]
    assert notes == ["the prompt has 17 tokens; the model reads the last 8"]


def test_unknown_characters_are_refused(model: GPT, tokenizer: CharTokenizer) -> None:
    with pytest.raises(UserError, match="'X'"):
        generated(model, tokenizer, "aXb", Sampling())


def test_how_texts_begin(tokenizer: CharTokenizer) -> None:
    assert tokenizer.decode(with_start(tokenizer.encode(""), tokenizer, None)) == "\n"
    assert tokenizer.decode(with_start(tokenizer.encode("ab"), tokenizer, None)) == "ab"
    ending = CharTokenizer("ab", end_of_text=True)
    assert with_start(ending.encode(""), ending, 2).tolist() == [2]
    assert with_start(ending.encode("b"), ending, 2).tolist() == [2, 1]
    # GPT-2's own texts: nothing before a prompt, and something to begin with where there is none.
    assert with_start(ending.encode(""), ending, None).tolist() == [2]
    assert with_start(ending.encode("b"), ending, None).tolist() == [1]


def test_streamed_pieces_are_the_text(model: GPT, tokenizer: CharTokenizer) -> None:
    pieces: list[str] = []
    sampling = Sampling(max_tokens=20, seed=1, stop=("zzz",))
    result = generated(model, tokenizer, "ab", sampling, stream=pieces.append)
    assert "".join(pieces) == result.texts[0]
    assert len([piece for piece in pieces if piece]) == 21, "each as it is made"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("ef",), "abcd"),
        (("x", "def"), "abc"),
        (("de", "cd"), "ab"),  # the earliest in the text wins
        (("d", "cd"), "ab"),  # also of those that end together
        (("fgz",), "abcdefghab"),  # begun, never finished: nothing is lost
        (("",), "abcdefghab"),
    ],
)
def test_stop_strings_end_the_text_before_them(
    tiny_model: Config, tokenizer: CharTokenizer, stop: tuple[str, ...], expected: str
) -> None:
    writes = Scripted(override(tiny_model, {"block_size": 64}), list(tokenizer.encode("abcdefgh")))
    pieces: list[str] = []
    sampling = Sampling(max_tokens=10, stop=stop, seed=0)
    result = generated(writes, tokenizer, "", sampling, stream=pieces.append)
    assert result.texts == [expected]
    assert "".join(pieces) == expected


def test_a_text_ends_at_its_end_of_text(tiny_model: Config) -> None:
    tokenizer = CharTokenizer(LETTERS[:18], end_of_text=True)
    assert tokenizer.end_of_text == 18
    ids = [*tokenizer.encode("abc"), tokenizer.end_of_text]
    writes = Scripted(override(tiny_model, {"block_size": 64}), ids)
    result = generated(writes, tokenizer, "", Sampling(max_tokens=50, samples=2, seed=0))
    assert result.texts == ["abc", "abc"]
    assert result.ended == [True, True]
    assert result.tokens == 8


def test_characters_of_several_bytes_are_never_cut() -> None:
    text = generation._Text("", ())

    class Bytes:
        def token_bytes(self, id: int) -> bytes:
            return bytes([id])

    pieces = [text.add(Bytes(), byte) for byte in "é🙂".encode()]  # type: ignore[arg-type]
    assert pieces == ["", "é", "", "", "", "🙂"]
    assert text.add(Bytes(), 0xC3) == ""  # type: ignore[arg-type]
    assert text.end() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("prompt", [1, 2, 3, 7, 8])
def test_a_cache_that_grows_gives_the_same_text(
    monkeypatch: pytest.MonkeyPatch, model: GPT, prompt: int
) -> None:
    ids, sampling = np.arange(prompt), Sampling(max_tokens=40, seed=5, samples=2)
    assert model.config.block_size == 8
    whole = list(tokens(model, ids, sampling, 19))
    monkeypatch.setattr(generation, "SMALLEST_BUCKET", 1)
    monkeypatch.setattr(generation, "SMALLEST_CACHE", 2)
    assert list(tokens(model, ids, sampling, 19)) == whole


def test_with_rotary_positions_the_text_slides_on(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Config
) -> None:
    """With one layer its text is that of reading the last block afresh for every token; and none
    is read in again.
    """
    model = GPT(override(tiny_model, {"position": "rope", "n_layer": 1}).model)
    model.update(tree_map(lambda p: 20 * p if p.ndim == 2 else p, model.parameters()))
    monkeypatch.setattr(generation, "SMALLEST_CACHE", 2)
    prefills: list[int] = []
    real = generation.Decoder.prefill

    def counted(self: generation.Decoder, window: np.ndarray) -> None:
        prefills.append(window.shape[1])
        real(self, window)

    monkeypatch.setattr(generation.Decoder, "prefill", counted)
    found = [row[0] for row in tokens(model, np.arange(3), Sampling(40, temperature=0), 19)]
    window = [0, 1, 2]
    for id in found:
        assert id == int(model(mx.array([window[-model.config.block_size :]]))[0, -1].argmax())
        window.append(id)
    assert prefills == [3]
    assert len(set(found)) > 3


def test_settings_reach_the_sampler(model: GPT) -> None:
    prompt = np.array([1, 2])
    greedy = list(tokens(model, prompt, Sampling(temperature=0, max_tokens=12), 19))
    only_one = list(tokens(model, prompt, Sampling(top_k=1, max_tokens=12, seed=3), 19))
    nucleus = list(tokens(model, prompt, Sampling(top_p=1e-6, max_tokens=12, seed=3), 19))
    peak = list(tokens(model, prompt, Sampling(min_p=1.0, max_tokens=12, seed=3), 19))
    assert greedy == only_one == nucleus == peak
    never_again = Sampling(temperature=0, repetition_penalty=100.0, max_tokens=12)
    rows = [row[0] for row in tokens(model, prompt, never_again, 19)]
    assert len({1, 2, *rows}) == 14, "prompt and all drawn tokens count as seen"


def test_ids_beyond_the_tokenizers_are_never_drawn(model: GPT) -> None:
    few = CharTokenizer("abc", end_of_text=False)
    result = generated(model, few, "ab", Sampling(max_tokens=60, temperature=5.0, seed=0))
    assert set(result.texts[0]) == set("abc")


def test_to_end_is_no_repetition_of_having_begun(tiny_model: Config) -> None:
    """The end-of-text that a text begins with is not penalised; another token is."""

    class Sure(GPT):
        def cached(self, ids, cache, position, last):  # type: ignore[no-untyped-def]
            row = mx.where(mx.arange(self.config.vocab_size) == 5, 9.0, 1.0)
            return mx.broadcast_to(row, (ids.shape[0], self.config.vocab_size)), cache

    model, prompt = Sure(tiny_model.model), np.array([5, 3])
    penalty = Sampling(1, temperature=0, repetition_penalty=100.0)
    assert next(tokens(model, prompt, penalty, 19, 5)) == [5]
    assert next(tokens(model, prompt, penalty, 19, 3)) != [5]
    assert next(tokens(model, prompt, penalty, 19)) != [5]


def test_a_decoder_goes_when_it_is_no_longer_used(model: GPT) -> None:
    """At once, not when Python next looks for cycles: a training makes one at each evaluation,
    and arrays that stay leave the memory around them in pieces.
    """
    gc.disable()
    try:
        decoder = generation.Decoder(model, Sampling(), 19)
        decoder.prefill(np.zeros((1, 4), dtype=np.int32))
        decoder.draw(mx.zeros((1, 19), dtype=mx.bool_), mx.random.key(0))
        decoder.step(mx.random.key(1))
        gone = weakref.ref(decoder)
        del decoder
        assert gone() is None
    finally:
        gc.enable()
