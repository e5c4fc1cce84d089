"""GGUF files in llama.cpp (from the package `xllamacpp`): the same ids, probabilities and text.
Needs the extra `oracle`.
"""

from __future__ import annotations

import json
import math
import random
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxgpt.config import ModelConfig
from mlxgpt.convert import gguf
from mlxgpt.data.tokenizers import bpe, tokenizer_json
from mlxgpt.data.tokenizers.base import AddedToken, Tokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params, load_parameters
from mlxgpt.utils.errors import UserError
from tests.helpers.tokenizer_folders import TEXTS_WITH_ADDED_TOKENS, make_tokenizer_tree

gguf_package = pytest.importorskip("gguf", reason="the extra `oracle` is not installed")
xllamacpp = pytest.importorskip("xllamacpp", reason="the extra `oracle` is not installed")

BLOCK_SIZE = 128
COUNT = 60  # predicted tokens per perplexity
PROMPT = "Once upon a time,  there wasn't a café.\n\nThe end of 1984…"


class LlamaServer:
    """A llama.cpp server with one model."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = BLOCK_SIZE
        params.n_parallel = 1
        params.cpuparams.n_threads = 1
        params.verbosity = 0
        params.warmup = False
        params.port = 0
        self._server = xllamacpp.Server(params)
        # Stopping the server before its loop has started hangs; after an answer it has started.
        self.complete([0], 1)

    def post(self, endpoint: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self._server.listening_address}/{endpoint}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ids(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of a text; with `add_special` as of a prompt."""
        tokens = self.post("tokenize", content=text, add_special=add_special, parse_special=False)
        return list(tokens["tokens"])

    def complete(self, prompt: list[int] | str, count: int) -> tuple[list[int], str]:
        """Greedy continuation: token ids and text."""
        answer = self.post(
            "completion", prompt=prompt, n_predict=count, temperature=0, return_tokens=True
        )
        return answer["tokens"], answer["content"]

    def top_logprobs(self, ids: list[int], count: int) -> dict[int, float]:
        """Log-probabilities of the likeliest `count` next tokens, by id."""
        answer = self.post(
            "completion",
            prompt=ids,
            n_predict=1,
            temperature=0,
            n_probs=count,
            logit_bias=[[0, 1e6]],  # sampling a token without text would return no probabilities
        )
        (token,) = answer["completion_probabilities"]
        return {candidate["id"]: candidate["logprob"] for candidate in token["top_logprobs"]}


def make_model(
    tokenizer: Tokenizer, *, bias: bool, num_unused_ids: int = 0, n_embd: int = 64, **parts: Any
) -> GPT:
    """A small model with noisy weights, so that an error in any array changes the output."""
    config = ModelConfig(
        n_layer=2,
        n_head=4,
        n_embd=n_embd,
        block_size=BLOCK_SIZE,
        vocab_size=tokenizer.vocab_size + num_unused_ids,
        dropout=0.0,
        bias=bias,
        **parts,
    )
    model = GPT(config, 1)
    arrays = flatten_params(model.parameters())
    keys = mx.random.split(mx.random.key(2), len(arrays))
    noisy = {
        name: value + 0.15 * mx.random.normal(value.shape, key=key)
        for (name, value), key in zip(arrays.items(), keys, strict=True)
    }
    load_parameters(model, noisy)
    return model


def write_model(
    folder: Path,
    model: GPT,
    tokenizer: Tokenizer,
    *,
    add_bos_token: bool = False,
    quantize: int | None = None,
) -> Path:
    path = folder / "model.gguf"
    arrays = flatten_params(model.parameters())
    content = gguf.GGUFModel(model.config, arrays, tokenizer, "small", add_bos_token)
    gguf.write_gguf(path, content, quantize)
    assert list(folder.iterdir()) == [path]
    return path


def small_bpe() -> Tokenizer:
    words = ["once upon a time", "there was", "the end", "wasn't 1984", "\n\n", "  ", "café …"]
    rng = random.Random(0)
    return bpe.train_bpe([" ".join(rng.choices(words, k=2000))], 500)


def all_logprobs(model: GPT, ids: list[int]) -> np.ndarray:
    logits = model(mx.array([ids]))[0]
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def greedy(model: GPT, ids: list[int], count: int, end: int | None) -> list[int]:
    """Greedy continuation, up to the end of the text."""
    new_ids: list[int] = []
    while len(new_ids) < count and (not new_ids or new_ids[-1] != end):
        new_ids.append(int(all_logprobs(model, ids + new_ids)[-1].argmax()))
    return new_ids


@pytest.fixture(params=["500 ids", "GPT-2's"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return small_bpe() if request.param == "500 ids" else request.getfixturevalue("gpt2")


@pytest.mark.parametrize("bias", [True, False])
def test_probabilities_and_text_match_llama_cpp(
    tmp_path: Path, tokenizer: Tokenizer, bias: bool
) -> None:
    model = make_model(tokenizer, bias=bias, num_unused_ids=7)
    llama = LlamaServer(write_model(tmp_path, model, tokenizer))
    ids = tokenizer.encode(PROMPT).tolist()
    assert llama.ids(PROMPT, add_special=True) == ids
    expected = all_logprobs(model, ids)
    for length in (1, 2, 5, len(ids)):
        actual = llama.top_logprobs(ids[:length], 300)
        assert len(actual) == 300
        for id, value in actual.items():
            assert value == pytest.approx(expected[length - 1, id], abs=0.01)
    tokens, text = llama.complete(PROMPT, 50)
    assert tokens == greedy(model, ids, 50, tokenizer.end_of_text)
    # Ids beyond the tokenizer and the end of text have no text.
    assert text == tokenizer.decode(id for id in tokens if id < tokenizer.vocab_size - 1)


TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="\0"))


def test_ids_of_any_text_match_llama_cpp(tmp_path: Path, tokenizer: Tokenizer) -> None:
    llama = LlamaServer(write_model(tmp_path, make_model(tokenizer, bias=False), tokenizer))
    pieces = st.sampled_from([" ", "  ", "\n", "'s", "'LL", "12", "é", "…", "The", "<|endoftext|>"])

    @settings(max_examples=200, derandomize=True, database=None, deadline=None)
    @given(st.lists(TEXTS | pieces).map("".join))
    def check(text: str) -> None:
        assert llama.ids(text) == tokenizer.encode(text).tolist()

    check()


def make_tokenizer(kind: str) -> Tokenizer:
    letters = list(map(chr, range(126, 0, -1)))
    if kind == "characters":
        return CharTokenizer.from_ids({c: n for n, c in enumerate(letters)})
    if kind == "characters with an end":
        ids = {c: n for n, c in enumerate([*letters, "€"], 1)}
        return CharTokenizer.from_ids(ids, [AddedToken(0, "</s>")], 0)
    tree = make_tokenizer_tree()
    names = [token["content"] for token in tree["added_tokens"]]
    names += [name for name in tree["model"]["vocab"] if name not in names]
    tree["model"]["vocab"] = {name: id for id, name in enumerate(names)}
    for token in tree["added_tokens"]:
        token["id"] = names.index(token["content"])
    return tokenizer_json.build_tokenizer(tree)


@pytest.mark.parametrize("kind", ["characters", "characters with an end", "BPE and added tokens"])
def test_ids_in_any_order_are_kept(tmp_path: Path, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    llama = LlamaServer(write_model(tmp_path, make_model(tokenizer, bias=False), tokenizer))
    pieces = st.text(st.characters(min_codepoint=1, max_codepoint=126))
    pieces = TEXTS_WITH_ADDED_TOKENS if kind.startswith("BPE") else pieces

    @settings(max_examples=200, derandomize=True, database=None, deadline=None)
    @given(pieces)
    def check(text: str) -> None:
        assert llama.ids(text) == tokenizer.encode(text).tolist()

    check()
    if tokenizer.end_of_text is not None:
        name = tokenizer.decode([tokenizer.end_of_text])
        special = llama.post("tokenize", content=name, parse_special=True)
        assert special == {"tokens": [tokenizer.end_of_text]}


@pytest.mark.parametrize("make", [small_bpe, lambda: CharTokenizer(PROMPT, end_of_text=True)])
@pytest.mark.parametrize("add", [True, False])
def test_end_of_text_is_prepended_if_add_bos_token(
    tmp_path: Path, make: Callable[[], Tokenizer], add: bool
) -> None:
    tokenizer = make()
    llama = LlamaServer(
        write_model(tmp_path, make_model(tokenizer, bias=False), tokenizer, add_bos_token=add)
    )
    ids = tokenizer.encode(PROMPT).tolist()
    prefix = [tokenizer.end_of_text] if add else []
    assert llama.ids(PROMPT, add_special=True) == prefix + ids
    assert llama.post("tokenize", content="<|endoftext|>", parse_special=True) == {
        "tokens": [tokenizer.end_of_text]
    }


@pytest.mark.parametrize(
    "tokenizer",
    [
        CharTokenizer(map(chr, range(1, 128)), end_of_text=False),
        CharTokenizer(map(chr, range(1, 128)), end_of_text=True),
        CharTokenizer("".join(map(chr, range(1, 600))) + "€漢🙂", end_of_text=True),
    ],
    ids=["ASCII", "ASCII with an end", "others with an end"],
)
def test_character_tokenizers_match_llama_cpp(tmp_path: Path, tokenizer: CharTokenizer) -> None:
    model = make_model(tokenizer, bias=True, n_embd=36)  # not a multiple of the block size 32
    llama = LlamaServer(write_model(tmp_path, model, tokenizer))

    @settings(max_examples=200, derandomize=True, database=None, deadline=None)
    @given(st.text(st.sampled_from(tokenizer.characters)))
    def check(text: str) -> None:
        assert llama.ids(text) == tokenizer.encode(text).tolist()

    check()
    prompt = "It's ~ [all]\n\t\\x00 "
    ids = tokenizer.encode(prompt).tolist()
    logprobs = all_logprobs(model, ids)[-1]
    for id, value in llama.top_logprobs(ids, tokenizer.vocab_size).items():
        assert value == pytest.approx(logprobs[id], abs=0.01)
    expected = greedy(model, ids, 50, tokenizer.end_of_text)
    assert tokenizer.end_of_text not in expected
    assert llama.complete(prompt, 50) == (expected, tokenizer.decode(expected))


def test_quantization_barely_changes_the_perplexity(tmp_path: Path) -> None:
    text = "".join(
        random.Random(1).choices(["the cat sat ", "on the mat. ", "a dog ran ", "\n"], k=900)
    )
    tokenizer = small_bpe()
    ids = tokenizer.encode(text)
    model = make_model(tokenizer, bias=True)
    train(model, ids)

    def perplexity(name: str, **options: Any) -> float:
        folder = tmp_path / name
        folder.mkdir()
        llama = LlamaServer(write_model(folder, model, tokenizer, **options))
        losses = [
            -llama.top_logprobs(ids[:end].tolist(), tokenizer.vocab_size)[int(ids[end])]
            for end in range(1, COUNT + 1)
        ]
        return math.exp(sum(losses) / len(losses))

    float32_perplexity = perplexity("full")
    eight, four = perplexity("eight", quantize=8), perplexity("four", quantize=4)
    print(
        f"perplexity {float32_perplexity:.4f} in float32, {eight:.4f} with 8 bits, {four:.4f} "
        "with 4"
    )
    logprobs = all_logprobs(model, ids[:COUNT].tolist())
    expected = math.exp(-logprobs[np.arange(COUNT), ids[1 : COUNT + 1]].mean())
    assert float32_perplexity == pytest.approx(expected, rel=0.002)
    assert eight == pytest.approx(float32_perplexity, rel=0.01)
    assert four == pytest.approx(float32_perplexity, rel=0.1)
    assert len({float32_perplexity, eight, four}) == 3


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_probabilities_of_qwen3_models_match_llama_cpp(
    tmp_path: Path, bits: int | None, apart: bool
) -> None:
    """Also quantized, compared with the rounded weights, and with an untied output head."""
    tokenizer = small_bpe()
    parts: dict[str, Any] = {"position": "rope", "norm": "rms", "qk_norm": True, "mlp": "swiglu"}
    model = make_model(tokenizer, bias=False, **parts, tied=not apart, embedding_norm=apart)
    llama = LlamaServer(write_model(tmp_path, model, tokenizer, quantize=bits))
    if bits:
        load_parameters(
            model, gguf.fake_quantize_gguf(model.config, flatten_params(model.parameters()), bits)
        )
    ids = tokenizer.encode(PROMPT).tolist()
    expected = all_logprobs(model, ids)[-1]
    actual = llama.top_logprobs(ids, 50)
    assert len(actual) == 50
    # llama.cpp also quantizes activations before multiplying them with quantized weights.
    for id, value in actual.items():
        assert value == pytest.approx(float(expected[id]), abs=0.1 if bits else 0.01), id


def train(model: GPT, ids: np.ndarray) -> None:
    """Train for 50 steps, so that the model has learned something."""
    optimizer = optim.Adam(2e-3)
    rng = np.random.default_rng(0)

    def loss(model: GPT, batch: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:], reduction="mean")

    step = nn.value_and_grad(model, loss)
    for _ in range(50):
        starts = rng.integers(0, len(ids) - BLOCK_SIZE, 4)
        batch = np.stack([ids[start : start + BLOCK_SIZE] for start in starts])
        _, gradients = step(model, mx.array(batch))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_all_arrays_are_in_the_file(tmp_path: Path, bits: int | None) -> None:
    tokenizer = small_bpe()
    model = make_model(tokenizer, bias=False)
    reader = gguf_package.GGUFReader(write_model(tmp_path, model, tokenizer, quantize=bits))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.name"] == "small"
    assert fields["general.file_type"] == {None: 0, 8: 7, 4: 2}[bits]
    assert fields.get("general.quantization_version") == (2 if bits else None)
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)

    arrays = flatten_params(model.parameters())
    our_names = {f"{gguf_name}": our_name for our_name, gguf_name in gguf.GPT2_TENSORS.items()}
    compared = 0
    for tensor in reader.tensors:
        values = gguf_package.dequantize(tensor.data, tensor.tensor_type)
        first, *rest = tensor.name.split(".")
        if first == "blk":
            our_name = f"h.{rest[0]}.{our_names[rest[1]]}.{rest[2]}"
        else:
            names = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f"}
            our_name = f"{names[first]}.{rest[0]}"
        if our_name.endswith("bias"):
            assert not values.any()
            continue
        compared += 1
        expected = np.array(arrays[our_name])
        if bits is None or expected.ndim == 1 or first == "position_embd":
            assert tensor.tensor_type.name == "F32"
            np.testing.assert_array_equal(values, expected)
        else:
            used_bits = 8 if first == "token_embd" else bits
            assert tensor.tensor_type.name == {8: "Q8_0", 4: "Q4_0"}[used_bits]
            step = abs(expected).max() * {8: 1 / 254, 4: 1 / 8}[used_bits]
            np.testing.assert_allclose(values, expected, atol=1.01 * step)
    assert compared == len(arrays)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    tokenizer = small_bpe()
    with pytest.raises(UserError, match=r"cannot write .*: No such file"):
        write_model(tmp_path / "no", make_model(tokenizer, bias=False), tokenizer)
    assert not list(tmp_path.iterdir())
