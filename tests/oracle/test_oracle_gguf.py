"""llama.cpp itself, as `xllamacpp` brings it, reads what we write: the same ids, the same
probabilities, the same text. Needs the extra `oracle`.
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
from tests.helpers.tokenizer_folders import PIECES, tree_with_added

package = pytest.importorskip("gguf", reason="the extra `oracle` is not installed")
xllamacpp = pytest.importorskip("xllamacpp", reason="the extra `oracle` is not installed")

BLOCK_SIZE = 128
COUNT = 60  # predictions behind a perplexity
PROMPT = "Once upon a time,  there wasn't a café.\n\nThe end of 1984…"


class Llama:
    """llama.cpp's server with one model."""

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
        # A server that ends before its loop has begun waits for ever: after an answer it has.
        self.continuation([0], 1)

    def ask(self, what: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self._server.listening_address}/{what}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ids(self, text: str, *, add_special: bool = False) -> list[int]:
        """A text's ids; with `add_special` as a prompt's."""
        tokens = self.ask("tokenize", content=text, add_special=add_special, parse_special=False)
        return list(tokens["tokens"])

    def continuation(self, prompt: list[int] | str, count: int) -> tuple[list[int], str]:
        """The likeliest next tokens, and their text."""
        answer = self.ask(
            "completion", prompt=prompt, n_predict=count, temperature=0, return_tokens=True
        )
        return answer["tokens"], answer["content"]

    def log_probabilities(self, ids: list[int], count: int) -> dict[int, float]:
        """Of the likeliest `count` next tokens, by id."""
        answer = self.ask(
            "completion",
            prompt=ids,
            n_predict=1,
            temperature=0,
            n_probs=count,
            logit_bias=[[0, 1e6]],  # there are none where a token without text is drawn
        )
        (token,) = answer["completion_probabilities"]
        return {one["id"]: one["logprob"] for one in token["top_logprobs"]}


def lively(
    tokenizer: Tokenizer, *, bias: bool, room: int = 0, n_embd: int = 64, **parts: Any
) -> GPT:
    """A small model whose every array matters: one that is wrong changes the answer."""
    config = ModelConfig(
        n_layer=2,
        n_head=4,
        n_embd=n_embd,
        block_size=BLOCK_SIZE,
        vocab_size=tokenizer.vocab_size + room,
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


def written(
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


def log_probabilities(model: GPT, ids: list[int]) -> np.ndarray:
    logits = model(mx.array([ids]))[0]
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def greedy(model: GPT, ids: list[int], count: int, end: int | None) -> list[int]:
    """The likeliest next tokens, up to the end of the text."""
    new: list[int] = []
    while len(new) < count and (not new or new[-1] != end):
        new.append(int(log_probabilities(model, ids + new)[-1].argmax()))
    return new


@pytest.fixture(params=["500 ids", "GPT-2's"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return small_bpe() if request.param == "500 ids" else request.getfixturevalue("gpt2")


@pytest.mark.parametrize("bias", [True, False])
def test_llama_cpp_says_what_we_say(tmp_path: Path, tokenizer: Tokenizer, bias: bool) -> None:
    model = lively(tokenizer, bias=bias, room=7)
    llama = Llama(written(tmp_path, model, tokenizer))
    ids = tokenizer.encode(PROMPT).tolist()
    assert llama.ids(PROMPT, add_special=True) == ids
    ours = log_probabilities(model, ids)
    for length in (1, 2, 5, len(ids)):
        theirs = llama.log_probabilities(ids[:length], 300)
        assert len(theirs) == 300
        for id, value in theirs.items():
            assert value == pytest.approx(ours[length - 1, id], abs=0.01)
    tokens, text = llama.continuation(PROMPT, 50)
    assert tokens == greedy(model, ids, 50, tokenizer.end_of_text)
    # What is drawn beyond the tokenizer's ids has no text, nor has the end.
    assert text == tokenizer.decode(id for id in tokens if id < tokenizer.vocab_size - 1)


TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="\0"))


def test_any_text_has_the_same_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    llama = Llama(written(tmp_path, lively(tokenizer, bias=False), tokenizer))
    pieces = st.sampled_from([" ", "  ", "\n", "'s", "'LL", "12", "é", "…", "The", "<|endoftext|>"])

    @settings(max_examples=200, derandomize=True, database=None, deadline=None)
    @given(st.lists(TEXTS | pieces).map("".join))
    def check(text: str) -> None:
        assert llama.ids(text) == tokenizer.encode(text).tolist()

    check()


def in_another_order(kind: str) -> Tokenizer:
    letters = list(map(chr, range(126, 0, -1)))
    if kind == "characters":
        return CharTokenizer.from_ids({c: n for n, c in enumerate(letters)})
    if kind == "characters with an end":
        ids = {c: n for n, c in enumerate([*letters, "€"], 1)}
        return CharTokenizer.from_ids(ids, [AddedToken(0, "</s>")], 0)
    tree = tree_with_added()
    names = [token["content"] for token in tree["added_tokens"]]
    names += [name for name in tree["model"]["vocab"] if name not in names]
    tree["model"]["vocab"] = {name: id for id, name in enumerate(names)}
    for token in tree["added_tokens"]:
        token["id"] = names.index(token["content"])
    return tokenizer_json.build_tokenizer(tree)


@pytest.mark.parametrize("kind", ["characters", "characters with an end", "BPE and added tokens"])
def test_ids_in_another_order_are_kept(tmp_path: Path, kind: str) -> None:
    tokenizer = in_another_order(kind)
    llama = Llama(written(tmp_path, lively(tokenizer, bias=False), tokenizer))
    pieces = st.text(st.characters(min_codepoint=1, max_codepoint=126))
    pieces = PIECES if kind.startswith("BPE") else pieces

    @settings(max_examples=200, derandomize=True, database=None, deadline=None)
    @given(pieces)
    def check(text: str) -> None:
        assert llama.ids(text) == tokenizer.encode(text).tolist()

    check()
    if tokenizer.end_of_text is not None:
        name = tokenizer.decode([tokenizer.end_of_text])
        special = llama.ask("tokenize", content=name, parse_special=True)
        assert special == {"tokens": [tokenizer.end_of_text]}


@pytest.mark.parametrize("make", [small_bpe, lambda: CharTokenizer(PROMPT, end_of_text=True)])
@pytest.mark.parametrize("add", [True, False])
def test_an_end_of_text_goes_before_a_prompt_where_told(
    tmp_path: Path, make: Callable[[], Tokenizer], add: bool
) -> None:
    tokenizer = make()
    llama = Llama(written(tmp_path, lively(tokenizer, bias=False), tokenizer, add_bos_token=add))
    ids = tokenizer.encode(PROMPT).tolist()
    before = [tokenizer.end_of_text] if add else []
    assert llama.ids(PROMPT, add_special=True) == before + ids
    assert llama.ask("tokenize", content="<|endoftext|>", parse_special=True) == {
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
def test_characters_are_tokens(tmp_path: Path, tokenizer: CharTokenizer) -> None:
    model = lively(tokenizer, bias=True, n_embd=36)  # no multiple of a block
    llama = Llama(written(tmp_path, model, tokenizer))

    @settings(max_examples=200, derandomize=True, database=None, deadline=None)
    @given(st.text(st.sampled_from(tokenizer.characters)))
    def check(text: str) -> None:
        assert llama.ids(text) == tokenizer.encode(text).tolist()

    check()
    prompt = "It's ~ [all]\n\t\\x00 "
    ids = tokenizer.encode(prompt).tolist()
    ours = log_probabilities(model, ids)[-1]
    for id, value in llama.log_probabilities(ids, tokenizer.vocab_size).items():
        assert value == pytest.approx(ours[id], abs=0.01)
    expected = greedy(model, ids, 50, tokenizer.end_of_text)
    assert tokenizer.end_of_text not in expected
    assert llama.continuation(prompt, 50) == (expected, tokenizer.decode(expected))


def test_a_quantized_model_is_nearly_as_good(tmp_path: Path) -> None:
    text = "".join(
        random.Random(1).choices(["the cat sat ", "on the mat. ", "a dog ran ", "\n"], k=900)
    )
    tokenizer = small_bpe()
    ids = tokenizer.encode(text)
    model = lively(tokenizer, bias=True)
    train(model, ids)

    def perplexity(name: str, **more: Any) -> float:
        folder = tmp_path / name
        folder.mkdir()
        llama = Llama(written(folder, model, tokenizer, **more))
        losses = [
            -llama.log_probabilities(ids[:end].tolist(), tokenizer.vocab_size)[int(ids[end])]
            for end in range(1, COUNT + 1)
        ]
        return math.exp(sum(losses) / len(losses))

    full = perplexity("full")
    eight, four = perplexity("eight", quantize=8), perplexity("four", quantize=4)
    print(f"perplexity {full:.4f} in float32, {eight:.4f} with 8 bits, {four:.4f} with 4")
    ours = log_probabilities(model, ids[:COUNT].tolist())
    expected = math.exp(-ours[np.arange(COUNT), ids[1 : COUNT + 1]].mean())
    assert full == pytest.approx(expected, rel=0.002)
    assert eight == pytest.approx(full, rel=0.01)
    assert four == pytest.approx(full, rel=0.1)
    assert len({full, eight, four}) == 3


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_model_of_qwen3s_parts_has_the_same_probabilities(
    tmp_path: Path, bits: int | None, apart: bool
) -> None:
    """Quantized, those of the weights as they are then; with a head of its own too."""
    tokenizer = small_bpe()
    parts: dict[str, Any] = {"position": "rope", "norm": "rms", "qk_norm": True, "mlp": "swiglu"}
    model = lively(tokenizer, bias=False, **parts, tied=not apart, embedding_norm=apart)
    llama = Llama(written(tmp_path, model, tokenizer, quantize=bits))
    if bits:
        load_parameters(
            model, gguf.fake_quantize(model.config, flatten_params(model.parameters()), bits)
        )
    ids = tokenizer.encode(PROMPT).tolist()
    expected = log_probabilities(model, ids)[-1]
    found = llama.log_probabilities(ids, 50)
    assert len(found) == 50
    # llama.cpp also rounds what it multiplies quantized weights with.
    for id, value in found.items():
        assert value == pytest.approx(float(expected[id]), abs=0.1 if bits else 0.01), id


def train(model: GPT, ids: np.ndarray) -> None:
    """Fifty steps, so that the weights are those of a model that knows something."""
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
def test_every_array_is_in_the_file(tmp_path: Path, bits: int | None) -> None:
    tokenizer = small_bpe()
    model = lively(tokenizer, bias=False)
    reader = package.GGUFReader(written(tmp_path, model, tokenizer, quantize=bits))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.name"] == "small"
    assert fields["general.file_type"] == {None: 0, 8: 7, 4: 2}[bits]
    assert fields.get("general.quantization_version") == (2 if bits else None)
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)

    arrays = flatten_params(model.parameters())
    own = {f"{theirs}": ours for ours, theirs in gguf.GPT2_TENSORS.items()}
    seen = 0
    for tensor in reader.tensors:
        values = package.dequantize(tensor.data, tensor.tensor_type)
        first, *rest = tensor.name.split(".")
        if first == "blk":
            ours = f"h.{rest[0]}.{own[rest[1]]}.{rest[2]}"
        else:
            names = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f"}
            ours = f"{names[first]}.{rest[0]}"
        if ours.endswith("bias"):
            assert not values.any()
            continue
        seen += 1
        expected = np.array(arrays[ours])
        if bits is None or expected.ndim == 1 or first == "position_embd":
            assert tensor.tensor_type.name == "F32"
            np.testing.assert_array_equal(values, expected)
        else:
            used = 8 if first == "token_embd" else bits
            assert tensor.tensor_type.name == {8: "Q8_0", 4: "Q4_0"}[used]
            step = abs(expected).max() * {8: 1 / 254, 4: 1 / 8}[used]
            np.testing.assert_allclose(values, expected, atol=1.01 * step)
    assert seen == len(arrays)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    tokenizer = small_bpe()
    with pytest.raises(UserError, match=r"cannot write .*: No such file"):
        written(tmp_path / "no", lively(tokenizer, bias=False), tokenizer)
    assert not list(tmp_path.iterdir())
