"""HellaSwag on a small file: against a naive implementation, and with damaged files."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.config import ModelConfig
from mlxgpt.data.tokenizers import bpe
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.evaluation import hellaswag
from mlxgpt.evaluation.hellaswag import (
    HellaSwagExample,
    ending_losses,
    evaluate_hellaswag,
    load_examples,
)
from mlxgpt.model.gpt import GPT
from mlxgpt.utils.errors import UserError
from tests.helpers.hellaswag_examples import CASES, EXAMPLES_JSONL, check_error_format, make_example


def make_model(vocab_size: int, block_size: int = 128, n_embd: int = 16, seed: int = 3) -> GPT:
    """A random model whose predictions are far from uniform."""
    model = GPT(ModelConfig(2, 2, n_embd, block_size, vocab_size, dropout=0.0, bias=True), seed)
    model.wte.weight = model.wte.weight * 20
    model.wpe.weight = model.wpe.weight * 20
    return model


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return bpe.train_bpe([EXAMPLES_JSONL], 300)


def reference_losses(
    model: GPT, tokenizer: Tokenizer, example: HellaSwagExample, bos: int | None
) -> list[list[float]]:
    """Losses of each token of each ending in nats, one sequence at a time, in double precision."""
    result = []
    for ending in example.endings:
        ids = [bos] if bos is not None else []
        ids += list(tokenizer.encode(example.context))
        first = len(ids)
        ids += list(tokenizer.encode(" " + ending))
        while len(ids) - 1 > model.config.block_size:
            ids, first = ids[1:], first - 1
        logits = np.array(model(mx.array([[int(i) for i in ids[:-1]]])))[0].astype(np.float64)
        nats = []
        for position in range(max(first, 1), len(ids)):
            before = logits[position - 1]
            highest = before.max()
            log_sum = highest + math.log(np.exp(before - highest).sum())
            nats.append(log_sum - before[ids[position]])
        result.append(nats)
    return result


def score_endings(
    model: GPT, tokenizer: Tokenizer, examples: list[HellaSwagExample], bos: int | None = None
) -> tuple[np.ndarray, np.ndarray, list[bool]]:
    """Summed losses [N, 4], token counts [N, 4] and truncated [N], in the order of the examples."""
    scores = sorted(
        ending_losses(model, tokenizer, examples, bos=bos), key=lambda score: score.example_index
    )
    assert [score.example_index for score in scores] == list(range(len(examples)))
    return (
        np.stack([s.losses for s in scores]),
        np.stack([s.token_counts for s in scores]),
        [s.truncated for s in scores],
    )


# Losses and accuracies.


@pytest.mark.parametrize("block_size", [7, 20, 33, 128])
@pytest.mark.parametrize("bos", [None, 5])
def test_losses_and_accuracies_match_a_naive_implementation(
    tokenizer: BPETokenizer, examples: list[HellaSwagExample], block_size: int, bos: int | None
) -> None:
    model = make_model(tokenizer.vocab_size, block_size)
    sums, counts, truncated = score_endings(model, tokenizer, examples, bos)
    correct = correct_norm = 0
    for index, example in enumerate(examples):
        nats = reference_losses(model, tokenizer, example, bos)
        assert [len(item) for item in nats] == counts[index].tolist()
        np.testing.assert_allclose(sums[index], [sum(item) for item in nats], atol=1e-4)
        correct += min(range(4), key=lambda n: sum(nats[n])) == example.label
        correct_norm += min(range(4), key=lambda n: sum(nats[n]) / len(nats[n])) == example.label
    longest = [
        (bos is not None)
        + len(tokenizer.encode(item.context))
        + max(len(tokenizer.encode(" " + ending)) for ending in item.endings)
        for item in examples
    ]
    assert truncated == [length > block_size + 1 for length in longest]
    assert any(truncated) == (block_size < 128)
    result = evaluate_hellaswag(model, tokenizer, examples, bos=bos)
    assert result.examples == len(CASES) == 12
    assert (result.accuracy, result.accuracy_norm) == (correct / 12, correct_norm / 12)
    assert result.accuracy_error == pytest.approx(math.sqrt(correct * (12 - correct) / 12**3))
    assert result.accuracy_norm_error == pytest.approx(
        math.sqrt(correct_norm * (12 - correct_norm) / 12**3)
    )
    assert result.cut == sum(truncated)


def test_sum_and_mean_choose_different_endings(
    tokenizer: BPETokenizer, examples: list[HellaSwagExample]
) -> None:
    """Otherwise the test above could not tell the two accuracies apart."""
    sums, counts, _ = score_endings(make_model(tokenizer.vocab_size), tokenizer, examples)
    assert (sums.argmin(1) != (sums / counts).argmin(1)).any()


@pytest.mark.parametrize("bucket", [1, 8, 100, 1000])
@pytest.mark.parametrize("at_once", [1, 300, 100_000])
def test_losses_do_not_depend_on_batches_and_padding(
    tokenizer: BPETokenizer,
    examples: list[HellaSwagExample],
    monkeypatch: pytest.MonkeyPatch,
    bucket: int,
    at_once: int,
) -> None:
    model = make_model(tokenizer.vocab_size)
    expected = score_endings(model, tokenizer, examples)
    monkeypatch.setattr(hellaswag, "BUCKET_TOKENS", bucket)
    monkeypatch.setattr(hellaswag, "BATCH_TOKENS", at_once)
    actual = score_endings(model, tokenizer, examples)
    np.testing.assert_allclose(actual[0], expected[0], atol=1e-4)
    assert actual[1].tolist() == expected[1].tolist()


@pytest.mark.usefixtures("compiler")
def test_batches_have_few_shapes(
    tokenizer: BPETokenizer, examples: list[HellaSwagExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shape is traced once, and none is longer than the block."""
    shapes = []

    class ShapeRecorder(GPT):
        def __call__(self, ids: mx.array, *args: Any, **given: Any) -> mx.array:
            shapes.append(tuple(ids.shape))
            return super().__call__(ids, *args, **given)

    monkeypatch.setattr(hellaswag, "BATCH_TOKENS", 500)
    model = ShapeRecorder(replace(make_model(tokenizer.vocab_size).config, block_size=70))
    short = HellaSwagExample("A man", ("is old.", "is a cat.", "rains.", "is."), 0)
    evaluate_hellaswag(model, tokenizer, [*examples, short, *examples, short])
    assert shapes == [(8, 32), (4, 64), (4, 70)]


@pytest.mark.parametrize("number", [0, 5, 11])
def test_permuted_endings_have_permuted_losses(
    tokenizer: BPETokenizer, examples: list[HellaSwagExample], number: int
) -> None:
    model, example = make_model(tokenizer.vocab_size), examples[number]
    orders = list(itertools.permutations(range(4)))
    permuted = [
        HellaSwagExample(
            example.context, tuple(example.endings[n] for n in o), o.index(example.label)
        )
        for o in orders
    ]
    sums, counts, _ = score_endings(model, tokenizer, permuted)
    for order, ending_sums, token_counts in zip(orders, sums, counts, strict=True):
        np.testing.assert_allclose(ending_sums, sums[0][list(order)], atol=1e-4)
        assert token_counts.tolist() == counts[0][list(order)].tolist()
    result, single = (
        evaluate_hellaswag(model, tokenizer, permuted),
        evaluate_hellaswag(model, tokenizer, [example]),
    )
    assert (result.accuracy, result.accuracy_norm) == (single.accuracy, single.accuracy_norm)


def make_copy_model(letters: str) -> tuple[GPT, CharTokenizer]:
    """A model that predicts the last character again with certainty: the embeddings are orthogonal,
    and the blocks add nothing.
    """
    tokenizer = CharTokenizer(letters, end_of_text=False)
    model = make_model(tokenizer.vocab_size, n_embd=32)
    model.wte.weight = 50 * mx.eye(32)[: tokenizer.vocab_size]
    model.wpe.weight = mx.zeros_like(model.wpe.weight)
    for block in model.h:
        for part in (block.attn.c_proj, block.mlp.c_proj):
            part.weight = mx.zeros_like(part.weight)
    return model, tokenizer


def test_a_certain_ending_is_chosen() -> None:
    model, tokenizer = make_copy_model("abcdef ")
    wrong = ("a", "fed", "   a   ")
    for label in range(4):
        endings = (*wrong[:label], "      ", *wrong[label:])
        result = evaluate_hellaswag(model, tokenizer, [HellaSwagExample("bead ", endings, label)])
        assert (result.accuracy, result.accuracy_norm) == (1, 1)
        assert (result.accuracy_error, result.accuracy_norm_error) == (0, 0)
        wrong_result = evaluate_hellaswag(
            model, tokenizer, [HellaSwagExample("bead ", endings, (label + 1) % 4)]
        )
        assert (wrong_result.accuracy, wrong_result.accuracy_norm) == (0, 0)


def test_a_uniform_model_chooses_the_shortest_ending() -> None:
    tokenizer = CharTokenizer("abcdef ", end_of_text=False)
    model = make_model(10)
    model.wte.weight = mx.zeros_like(model.wte.weight)
    example = HellaSwagExample("bead", ("fade", "a", "face", "dead bee"), 1)
    sums, counts, _ = score_endings(model, tokenizer, [example])
    assert counts.tolist() == [[5, 2, 5, 9]]
    np.testing.assert_allclose(sums[0], counts[0] * math.log(10), rtol=1e-5)
    assert evaluate_hellaswag(model, tokenizer, [example]).accuracy == 1


def test_progress_is_reported_for_every_example(
    tokenizer: BPETokenizer, examples: list[HellaSwagExample]
) -> None:
    updates: list[tuple[int, int, float]] = []
    result = evaluate_hellaswag(
        make_model(tokenizer.vocab_size),
        tokenizer,
        examples,
        progress=lambda *update: updates.append(update),
    )
    assert [done for done, _, _ in updates] == list(range(1, 13))
    assert {total for _, total, _ in updates} == {12}
    assert updates[-1][2] == result.accuracy_norm
    assert all(share * done == pytest.approx(round(share * done)) for done, _, share in updates)


# Errors of the evaluation.


def test_a_tokenizer_that_lacks_characters_is_refused(examples: list[HellaSwagExample]) -> None:
    letters = {letter for case in CASES for text in case for letter in str(text)} - set("zé–")
    tokenizer = CharTokenizer(letters, end_of_text=False)
    with pytest.raises(UserError) as error:
        evaluate_hellaswag(make_model(tokenizer.vocab_size), tokenizer, examples)
    check_error_format(
        error.value, "^HellaSwag has characters that this model's tokenizer lacks: .*: 'z' 'é' '–'$"
    )
    without_spaces = CharTokenizer("abc", end_of_text=False)
    with pytest.raises(UserError, match="does not know these characters: ' '"):
        evaluate_hellaswag(
            make_model(3), without_spaces, [HellaSwagExample("a", ("a", "b", "c", "b"), 0)]
        )


@pytest.mark.parametrize(("room", "bos"), [(299, None), (300, 300), (300, -1)])
def test_ids_beyond_the_model_are_refused(
    tokenizer: BPETokenizer, examples: list[HellaSwagExample], room: int, bos: int | None
) -> None:
    assert tokenizer.vocab_size == 300
    with pytest.raises(UserError) as error:
        evaluate_hellaswag(make_model(room), tokenizer, examples, bos=bos)
    check_error_format(error.value, f"ids beyond the model's vocabulary of {room}")


def test_no_examples_and_nonfinite_losses_are_refused(
    tokenizer: BPETokenizer, examples: list[HellaSwagExample]
) -> None:
    model = make_model(tokenizer.vocab_size)
    with pytest.raises(UserError) as error:
        evaluate_hellaswag(model, tokenizer, [])
    check_error_format(error.value, "no HellaSwag examples")
    model.ln_f.weight = model.ln_f.weight * math.nan
    with pytest.raises(UserError) as error:
        evaluate_hellaswag(model, tokenizer, examples)
    check_error_format(error.value, "losses are not finite")


def test_lone_surrogates_are_accepted(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text(json.dumps({**make_example(), "ctx": "a \ud83d b"}))
    assert (
        evaluate_hellaswag(
            make_model(300), tokenizer, load_examples(tmp_path / "odd.jsonl")
        ).examples
        == 1
    )


def test_line_ends_are_normalized_as_in_training_texts(tmp_path: Path) -> None:
    endings = ["a\r\nb", "c\rd", "\ufeffe", "f"]
    odd = {**make_example(), "ctx": "\ufeffa\r\nb", "endings": endings}
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd))
    (example,) = load_examples(tmp_path / "odd.jsonl")
    assert (example.context, *example.endings) == ("a\nb", "a\nb", "c\nd", "e", "f")


# Loading files.


def test_load_examples(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(EXAMPLES_JSONL.replace("\n", "\r\n\n"), encoding="utf-8")
    examples = load_examples(path)
    assert [(e.context, e.label, *e.endings) for e in examples] == CASES


DAMAGED_LINES: dict[str, Any] = {
    "cut short": json.dumps(make_example())[:-9],
    "no object": "[]",
    "a number": "3",
    "nested": "[" * 100_000,
    "other encoding": '{"ctx": "café"}'.encode("latin-1"),
    "zipped": b"\x1f\x8b\x08\0",
    "no context": {"ctx": None},
    "empty context": {"ctx": ""},
    "context in parts": {"ctx": ["a", "b"]},
    "three endings": {"endings": ["a", "b", "c"]},
    "five endings": {"endings": ["a", "b", "c", "d", "e"]},
    "an ending that is none": {"endings": ["a", "b", "c", 4]},
    "no endings": {"endings": None},
    "endings in one": {"endings": "abcd"},
    "no label": {"label": None},  # as in the test split
    "label 4": {"label": 4},
    "label -1": {"label": -1},
    "true": {"label": True},
    "one and a half": {"label": 1.5},
    "text": {"label": "1"},
    "endless": {"label": 10**30},
}


@pytest.mark.parametrize("damage", DAMAGED_LINES)
def test_a_damaged_line_is_reported(tmp_path: Path, damage: str) -> None:
    content = DAMAGED_LINES[damage]
    if isinstance(content, dict):
        content = json.dumps(make_example() | content)
    content = content if isinstance(content, bytes) else content.encode()
    path = tmp_path / "bad.jsonl"
    path.write_bytes(EXAMPLES_JSONL.encode() + b"\n" + content + b"\n" + EXAMPLES_JSONL.encode())
    with pytest.raises(UserError) as error:
        load_examples(path)
    check_error_format(error.value, f"^{re.escape(str(path))}, line 14 (has|is) ")


def test_unreadable_and_oversized_files_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, problem in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(UserError) as error:
            load_examples(path)
        check_error_format(error.value, f"^cannot read {re.escape(str(path))}: {problem}$")
    monkeypatch.setattr(hellaswag, "MAX_FILE_BYTES", len(EXAMPLES_JSONL.encode()))
    (tmp_path / "large").write_text(EXAMPLES_JSONL)
    assert len(load_examples(tmp_path / "large")) == 12
    (tmp_path / "large").write_text(EXAMPLES_JSONL + "\n")
    with pytest.raises(UserError) as error:
        load_examples(tmp_path / "large")
    check_error_format(error.value, "is larger than")
