"""Examples to fine-tune on, as rows of files: prompts with answers, conversations, and preference
pairs.

A row of a JSON or Parquet file is an example if it has the keys `messages`, or `prompt` and
`completion`, and a pair if it has `chosen` and `rejected`; these are strings or lists of messages.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mlxgpt.config import DataConfig
from mlxgpt.data import readers
from mlxgpt.data.normalize import normalize_text
from mlxgpt.data.tokenizers.base import NUL
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

Message = Mapping[str, Any]  # with the keys "role" and "content"


@dataclass(frozen=True)
class ExampleRow:
    """A row of a file.

    Attributes:
        location: such as "FILE, line 3".
        messages: a conversation; a prompt and a completion that are strings are two messages.
        prompt_length: how many messages are never trained.
        is_text: whether prompt and completion are strings.
        rejected: the rejected answer of a pair; empty if the row is not a pair.
    """

    location: str
    messages: Sequence[Message]
    prompt_length: int = 0
    is_text: bool = False
    rejected: Sequence[Message] = ()

    @cached_property
    def key(self) -> str:
        """Hash of the row's contents."""
        contents = [self.messages, self.prompt_length, self.is_text]
        text = json.dumps([*contents, self.rejected] if self.is_pair else contents, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def is_pair(self) -> bool:
        return bool(self.rejected)

    def answers(self) -> list[ExampleRow]:
        """The row; of a pair, the prompt with the chosen answer, and with the rejected one."""
        if not self.is_pair:
            return [self]
        rejected = [*self.messages[: self.prompt_length], *self.rejected]
        return [replace(self, rejected=()), replace(self, messages=rejected, rejected=())]


def find_first_example(data: DataConfig) -> ExampleRow | None:
    """The first row of a source if it consists of examples; None for text.

    Raises:
        UserError: if the source cannot be read, or its first row is not a valid example.
    """
    path = files.expand_user(data.source[0]) if data.source else None
    if path and files.is_file(path):
        for location, row in readers.read_rows(path):
            return _parse_row(location, row) if _has_example_keys(row) else None
    return None


def uses_template(row: ExampleRow, data: DataConfig) -> bool:
    """Whether examples such as this one are rendered with a chat template."""
    return data.template or not row.is_text


EXAMPLE_KEYS = ({"messages"}, {"prompt", "completion"}, {"chosen", "rejected"})


def _has_example_keys(row: Any) -> bool:
    return isinstance(row, dict) and any(keys <= row.keys() for keys in EXAMPLE_KEYS)


def read_examples(paths: Sequence[str]) -> Iterator[ExampleRow]:
    """Read the examples of some JSON and Parquet files.

    Raises:
        UserError: if a row is not an example, or is a pair and others are not, with its location.
    """
    first: ExampleRow | None = None
    for path in map(files.expand_user, paths):
        if path.suffix.lower() not in readers.ROW_READERS or not files.is_file(path):
            raise UserError(
                f"{path} cannot contain prompts and answers, as {paths[0]} does",
                f"use only files that end in {', '.join(readers.ROW_READERS)}.",
            )
        for location, row in readers.read_rows(path):
            if not _has_example_keys(row):
                keys = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
                raise UserError(
                    f"{location} has {keys}, not 'messages', nor 'prompt' and 'completion'",
                    "give all rows the same keys, or omit that line.",
                )
            example = _parse_row(location, row)
            first = first or example
            if example.is_pair != first.is_pair:
                raise UserError(
                    f"only one of {first.location} and {location} is a pair of answers",
                    "give all rows the same keys, or omit that line.",
                )
            yield example


def _parse_row(location: str, row: Mapping[str, Any]) -> ExampleRow:
    if {"chosen", "rejected"} <= row.keys():
        row = _split_off_prompt(row)
        chosen, rejected = (_parse_answer(location, row, key) for key in ("chosen", "rejected"))
        if chosen.key == rejected.key:
            raise UserError(
                f"{location} has the same chosen and rejected answer, so its gradient would be 0",
                "omit that line.",
            )
        return replace(chosen, rejected=rejected.messages[rejected.prompt_length :])
    if "messages" in row:
        return ExampleRow(location, _check_messages(row["messages"], "messages", location))
    return _parse_answer(location, row, "completion")


def _split_off_prompt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take the prompt from conversations that start with it, as in most preference datasets on the
    hub (HuggingFaceH4/ultrafeedback_binarized has `prompt` as a string, too;
    trl-lib/ultrafeedback_binarized does not have it).
    """
    chosen, rejected = row["chosen"], row["rejected"]
    are_conversations = isinstance(chosen, list) and isinstance(rejected, list)
    if isinstance(row.get("prompt"), list) or not are_conversations:
        return row
    pairs = zip(chosen, rejected, strict=False)
    count = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return {
        **row,
        "prompt": chosen[:count],
        "chosen": chosen[count:],
        "rejected": rejected[count:],
    }


def _parse_answer(location: str, row: Mapping[str, Any], key: str) -> ExampleRow:
    """Parse a prompt and the answer with some key."""
    if "prompt" not in row:
        raise UserError(
            f"{location} has no 'prompt'", "move what both answers begin with to the key 'prompt'."
        )
    prompt, answer = row["prompt"], row[key]
    if is_text := isinstance(prompt, str) and isinstance(answer, str):
        prompt = [{"role": "user", "content": prompt}]
        answer = [{"role": "assistant", "content": answer}]
    elif isinstance(prompt, str) or isinstance(answer, str):
        raise UserError(
            f"{location}: one of prompt and {key} is text, the other is not",
            "use two strings, or two lists of messages.",
        )
    messages = [
        *_check_messages(prompt, "prompt", location),
        *_check_messages(answer, key, location),
    ]
    return ExampleRow(location, messages, len(prompt), is_text)


def _check_messages(value: Any, key: str, location: str) -> list[Message]:
    """Check a list of messages, normalize their texts, and omit their other keys that are null: in
    a Parquet file, every message has the keys that any message has.
    """
    is_valid = isinstance(value, list) and all(
        isinstance(message, dict)
        and all(isinstance(message.get(name), str) for name in ("role", "content"))
        for message in value
    )
    if not is_valid or not value:
        raise UserError(
            f"{location}: {key} is not a list of messages",
            'use the form [{"role": "user", "content": "…"}, {"role": "assistant", …}]',
        )
    return [
        {name: field for name, field in message.items() if field is not None}
        | {"content": _check_text(message["content"], location)}
        for message in value
    ]


def _check_text(text: str, location: str) -> str:
    if NUL in text:
        raise UserError(f"{location} contains a NUL character", "strip it from the text.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{location} is not valid Unicode", "fix or omit that line.") from error
    return normalize_text(text)
