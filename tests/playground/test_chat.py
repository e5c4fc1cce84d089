from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlxgpt.corpus import tokenizer_file
from mlxgpt.corpus.bpe import BPETokenizer
from mlxgpt.errors import UserError
from mlxgpt.playground import chat
from tests.interchange.tokenizer_folders import tree_with_added

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}"
    "<|endoftext|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
MODEL: Any = SimpleNamespace(tokenizer=BPETokenizer([]), ids=lambda text: np.array([256]))


def test_the_template_alone_ends_texts() -> None:
    """What a person writes is text, also where it looks like the end of one."""
    said = [{"role": "user", "content": "a\0<|endoftext|>"}]
    ids = chat.ids(TEMPLATE, chat.checked(said), MODEL)
    tokenizer = MODEL.tokenizer
    assert ids == [
        256,
        *tokenizer.encode("[user] a<|endoftext|>"),
        256,
        *tokenizer.encode("[assistant]"),
    ]


def test_special_tokens_of_a_template_are_tokens() -> None:
    """Those in what a person writes are text."""
    tokenizer = tokenizer_file.tokenizer_of(tree_with_added(), "<|im_end|>")
    model: Any = SimpleNamespace(tokenizer=tokenizer, ids=lambda text: np.array([282]))
    template = (
        "{% for m in messages %}<pad>{{ m.content }}{{ eos_token }}\n{% endfor %}<|endoftext|>"
    )
    said = chat.checked([{"role": "user", "content": "a <pad> cat"}])
    text = tokenizer.encode("a <pad> cat").tolist()
    assert 280 not in text
    assert chat.ids(template, said, model) == [280, *text, 282, *tokenizer.encode("\n"), 279]


def test_line_ends_of_a_message_are_normalized() -> None:
    ids = [
        chat.ids(TEMPLATE, chat.checked([{"role": "user", "content": content}]), MODEL)
        for content in ("a\nb", "a\r\nb", "a\rb")
    ]
    assert ids[0] == ids[1] == ids[2]


def test_parts_of_a_content() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    assert chat.checked([{"role": "user", "content": parts}])[0]["content"] == "ab"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{% for x in range(10 ** 9) %}a{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% if %}",
        "{{ messages[5].content.nothing.at.all }}",
        "{{ '\\x00' }}",
        "{{ '\\x00none\\x00' }}",
    ],
)
def test_a_strangers_template_does_no_harm(template: str) -> None:
    with pytest.raises(UserError, match="cannot be used"):
        chat.ids(template, chat.checked([{"role": "user", "content": "a"}]), MODEL)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(folder=tmp_path, name="mine")
    with pytest.raises(UserError, match="no chat template"):
        chat.template_of(run)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        chat.template_of(run)
