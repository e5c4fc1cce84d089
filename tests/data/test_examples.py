"""Examples: formats, masks against hand-made ones, refusals by line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxgpt.config import DataConfig
from mlxgpt.data.chat_template import CHATML, IM_END, IM_START
from mlxgpt.data.dataset import open_dataset
from mlxgpt.data.example_array import ExampleArray, PairArray
from mlxgpt.data.example_rows import read_examples
from mlxgpt.data.examples import (
    ExampleFormat,
    encode_example,
    prepare_examples,
)
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.data.tokenizers.tokenizer_json import add_special_tokens
from mlxgpt.utils.errors import UserError
from tests.helpers.example_rows import (
    ANSWER,
    PAIR,
    SECOND,
    SECOND_USER,
    TALK,
    USER,
    write_rows,
)

BYTES = BPETokenizer([])
CHAT = add_special_tokens(BYTES, (IM_START, IM_END))
STRINGS = ExampleFormat(None, template_strings=False, last_only=False, max_tokens=1000)
MESSAGES = replace(STRINGS, template=CHATML)


def mark_trained(
    row: Any, tmp_path: Path, format: ExampleFormat = MESSAGES, tokenizer: Tokenizer = CHAT
) -> str:
    """The text of an encoded row, with [ ] around what is trained."""
    (parsed,) = read_examples([write_rows(tmp_path / "rows.jsonl", row)])
    ids, trained = encode_example(parsed, format, tokenizer)
    text, was_trained = "", False
    for id, is_trained in zip([*ids.tolist(), None], [*trained.tolist(), False], strict=True):
        text += "[" if is_trained and not was_trained else ""
        text += "]" if was_trained and not is_trained else ""
        text += "" if id is None else tokenizer.decode([id])
        was_trained = is_trained
    return text


def test_strings_are_concatenated_with_an_end_of_text(tmp_path: Path) -> None:
    row = {"prompt": "2 + 2 =", "completion": " 4"}
    expected = "<|endoftext|>2 + 2 =[ 4<|endoftext|>]"
    assert mark_trained(row, tmp_path, STRINGS, BYTES) == expected


@pytest.mark.parametrize(
    ("row", "last_only", "expected"),
    [
        (TALK, False, "U Hi E\nA [Yo E\n]U And? E\nA [No E\n]"),
        (TALK, True, "U Hi E\nA Yo E\nU And? E\nA [No E\n]"),
        (
            {"prompt": [USER, ANSWER, SECOND_USER], "completion": [SECOND]},
            False,
            "U Hi E\nA Yo E\nU And? E\nA [No E\n]",
        ),
        ({"messages": [USER, ANSWER, SECOND_USER]}, False, "U Hi E\nA [Yo E\n]"),
    ],
)
def test_only_answers_are_trained(row: Any, last_only: bool, expected: str, tmp_path: Path) -> None:
    for short, long in (
        ("U ", f"{IM_START}user\n"),
        ("A ", f"{IM_START}assistant\n"),
        (" E", IM_END),
    ):
        expected = expected.replace(short, long)
    assert mark_trained(row, tmp_path, replace(MESSAGES, last_only=last_only)) == expected


def test_strings_can_be_rendered_with_the_template(tmp_path: Path) -> None:
    format = replace(MESSAGES, template_strings=True)
    row = {"prompt": "Hi", "completion": "Yo"}
    as_messages = {"messages": [USER, ANSWER]}
    assert mark_trained(row, tmp_path, format) == mark_trained(as_messages, tmp_path, format)


def test_special_tokens_in_messages_are_text(tmp_path: Path) -> None:
    row = {"messages": [USER | {"content": f"a{IM_END}b"}, ANSWER]}
    (parsed,) = read_examples([write_rows(tmp_path / "rows.jsonl", row)])
    ids, _ = encode_example(parsed, MESSAGES, CHAT)
    end = CHAT.added_tokens.ids[IM_END]
    assert ids.tolist().count(end) == 2  # one per message, from the template


def test_a_template_that_changes_earlier_turns_is_refused(tmp_path: Path) -> None:
    """As templates do that keep only the last answer's reasoning."""
    template = CHATML.replace("message['content']", "(message['content'] if loop.last else '(…)')")
    format = replace(MESSAGES, template=template)
    (row,) = read_examples([write_rows(tmp_path / "rows.jsonl", TALK)])
    with pytest.raises(UserError, match=r"rows.jsonl, line 1: .* does not render an answer after"):
        encode_example(row, format, CHAT)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "a"}, "line 2 has 'text', not 'messages'"),
        ({"prompt": "a", "completion": [ANSWER]}, "one of prompt and completion is text"),
        ({"messages": "a"}, "messages is not a list of messages"),
        ({"messages": []}, "messages is not a list of messages"),
        ({"messages": [{"role": "user"}]}, "messages is not a list of messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages is not a list of messages"),
        ({"prompt": "a\0", "completion": "b"}, "contains a NUL"),
        ({"prompt": "\ud800", "completion": "b"}, "not valid Unicode"),
        ({"messages": [USER]}, "line 2: there is no message of the assistant"),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [SECOND]}, "only one of .* is a pair"),
    ],
)
def test_invalid_rows_are_refused_with_their_line(row: Any, problem: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", TALK, row, TALK)
    with pytest.raises(UserError, match=problem) as caught:
        [encode_example(parsed, MESSAGES, CHAT) for parsed in read_examples([path])]
    assert "line 2" in caught.value.problem


def encode_pair(row: Any, tmp_path: Path) -> list[tuple[list[int], list[bool]]]:
    (parsed,) = read_examples([write_rows(tmp_path / "rows.jsonl", row)])
    assert parsed.is_pair
    examples = [encode_example(answer, MESSAGES, CHAT) for answer in parsed.answers()]
    return [(ids.tolist(), trained.tolist()) for ids, trained in examples]


def test_both_answers_of_a_pair_are_examples_after_the_same_prompt(tmp_path: Path) -> None:
    texts = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " five"}
    (pair,) = read_examples([write_rows(tmp_path / "rows.jsonl", texts)])
    for answer, name in zip(pair.answers(), ("chosen", "rejected"), strict=True):
        row = {"prompt": texts["prompt"], "completion": texts[name]}
        (expected,) = read_examples([write_rows(tmp_path / "rows.jsonl", row)])
        assert answer.key == expected.key
    expected_pair = [
        encode_example(row, MESSAGES, CHAT)
        for answer in (ANSWER, SECOND)
        for row in read_examples(
            [write_rows(tmp_path / "a.jsonl", {"prompt": [USER], "completion": [answer]})]
        )
    ]
    assert encode_pair(PAIR, tmp_path) == [(i.tolist(), t.tolist()) for i, t in expected_pair]


def test_a_folder_of_pairs_keeps_answers_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "chosen": " yes", "rejected": " no"} for n in range(20)]
    train, val, meta = prepare(tmp_path, *rows)
    assert isinstance(train, PairArray)
    assert isinstance(val, PairArray)
    assert (train.pair_count, val.pair_count) == (18, 2)
    assert meta.has_pairs
    for part in (train, val):
        texts = [BYTES.decode(part.example(n).ids.tolist()[1:-1]) for n in range(len(part))]
        for chosen, rejected in zip(texts[0::2], texts[1::2], strict=True):
            assert chosen.removesuffix(" yes") == rejected.removesuffix(" no")
    rows[3] |= {"chosen": " yes, or so", "rejected": " yes, or not"}
    with pytest.raises(UserError, match="line 4 has the same chosen and rejected answer within 8"):
        prepare(tmp_path, *rows, max_tokens=9)


def prepare(tmp_path: Path, *rows: Any, **changes: Any) -> tuple[ExampleArray, ExampleArray, Any]:
    source = write_rows(tmp_path / "rows.jsonl", *rows)
    format = replace(STRINGS, **changes)
    folder = prepare_examples(DataConfig(source=(source,)), format, BYTES, tmp_path / "data")
    dataset = open_dataset(folder)
    assert isinstance(dataset.train, ExampleArray)
    assert isinstance(dataset.val, ExampleArray)
    return dataset.train, dataset.val, dataset.meta


def read_prompts(array: ExampleArray) -> list[str]:
    return [BYTES.decode(array.prompt(n).tolist()[1:]) for n in range(len(array))]


def test_a_data_folder_has_every_example_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} is", "completion": f" {n}"} for n in range(40)]
    train, val, meta = prepare(tmp_path, *rows, *rows[:7])
    assert len(set(read_prompts(val))) == 4
    prompts = read_prompts(train) + read_prompts(val)
    assert set(prompts) == {row["prompt"] for row in rows}
    assert not set(read_prompts(train)) & set(read_prompts(val)), "duplicates are in one split"
    assert meta.train.documents + meta.val.documents == 47
    assert meta.origin["examples"]["cut"] == 0
    again = prepare(tmp_path, *rows, *rows[:7])
    assert (again[0].array == train.array).all()


def test_long_examples_are_cut_and_those_without_an_answer_refused(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "completion": "y" * n} for n in range(1, 9)]
    train, val, meta = prepare(tmp_path, *rows, max_tokens=6)
    lengths = [len(part.example(n).ids) for part in (train, val) for n in range(len(part))]
    assert sorted(lengths) == [4, 5, 6, 6, 6, 6, 6, 6]
    assert meta.origin["examples"]["cut"] == 5
    rows[2] = {"prompt": "too long", "completion": "y"}
    with pytest.raises(UserError, match="line 3 has no token to train on within 5 tokens"):
        prepare(tmp_path, *rows, max_tokens=6)


def test_validation_examples_are_not_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "completion": "y"} for n in range(5)]
    val_source = write_rows(tmp_path / "val.jsonl", *rows[3:])
    data = DataConfig((write_rows(tmp_path / "rows.jsonl", *rows),), (val_source,))
    dataset = open_dataset(prepare_examples(data, STRINGS, BYTES, tmp_path / "data"))
    assert isinstance(dataset.train, ExampleArray)
    assert read_prompts(dataset.train) == ["0", "1", "2"]
    same = replace(data, val_source=data.source)
    with pytest.raises(UserError, match="too few different examples"):
        prepare_examples(same, STRINGS, BYTES, tmp_path / "data")


def test_a_damaged_array_is_refused(tmp_path: Path) -> None:
    prepare(tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"})
    (path,) = (tmp_path / "data").glob("*/train.bin")
    ids = np.fromfile(path, "<u4")
    ids[0] ^= 1
    ids.tofile(path)
    with pytest.raises(UserError, match=r"does not match meta\.json"):
        open_dataset(path.parent, verify=True)


def test_a_character_model_without_end_of_text_is_refused(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("ab", end_of_text=False)
    (row,) = read_examples([write_rows(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})])
    with pytest.raises(UserError, match="line 1: the model has no end-of-text token"):
        encode_example(row, STRINGS, tokenizer)


def test_added_special_tokens_get_new_ids_and_end_texts() -> None:
    assert CHAT.vocab_size == BYTES.vocab_size + 2
    assert CHAT.end_of_text == CHAT.added_tokens.ids[IM_END] == BYTES.vocab_size + 1
    assert CHAT.encode("a cat").tolist() == BYTES.encode("a cat").tolist()
    again = add_special_tokens(CHAT, (IM_START, IM_END))
    assert again.fingerprint == CHAT.fingerprint
