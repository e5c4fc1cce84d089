from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from pydantic import ValidationError

from mlxgpt.data import chat_template
from mlxgpt.data.tokenizers import tokenizer_json
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.playground.request_body import ChatMessage
from mlxgpt.utils.errors import UserError
from tests.helpers.tokenizer_folders import make_tokenizer_tree

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}"
    "<|endoftext|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOKENIZER = BPETokenizer([])


def parse_messages(*messages: Any) -> list[ChatMessage]:
    return [ChatMessage.model_validate(message) for message in messages]


def encode(template: str, *messages: Any, tokenizer: Tokenizer = TOKENIZER) -> list[int]:
    """Encode messages as the API gets them."""
    parsed = [
        message.raw_fields | {"content": message.content} for message in parse_messages(*messages)
    ]
    return chat_template.encode_chat(template, parsed, tokenizer)


def test_messages_cannot_contain_an_end_of_text() -> None:
    """Only the template can insert it."""
    for name in ("content", "name"):
        message = {"role": "user", "content": "a"} | {name: "a\0<|endoftext|>"}
        assert encode(TEMPLATE.replace("content", name), message) == [
            256,
            *TOKENIZER.encode("[user] a<|endoftext|>"),
            256,
            *TOKENIZER.encode("[assistant]"),
        ]


def test_special_tokens_of_a_template_are_encoded_as_tokens() -> None:
    """Special tokens in messages are encoded as text."""
    tokenizer = tokenizer_json.build_tokenizer(make_tokenizer_tree(), "<|im_end|>")
    template = (
        "{% for m in messages %}<pad>{{ m.content }}{{ eos_token }}\n{% endfor %}<|endoftext|>"
    )
    message = {"role": "user", "content": "a <pad> cat"}
    text = tokenizer.encode("a <pad> cat").tolist()
    assert 280 not in text
    assert encode(template, message, tokenizer=tokenizer) == [
        280,
        *text,
        282,
        *tokenizer.encode("\n"),
        279,
    ]


def test_line_endings_of_a_message_are_normalized() -> None:
    ids = [
        encode(TEMPLATE, {"role": "user", "content": content})
        for content in ("a\nb", "a\r\nb", "a\rb")
    ]
    assert ids[0] == ids[1] == ids[2]


def test_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = parse_messages({"role": "user", "content": parts})
    assert message.content == "ab"
    for part in ({"type": "image_url"}, {"type": "text"}, {"text": "c"}, "c", None):
        with pytest.raises(ValidationError):
            parse_messages({"role": "user", "content": [*parts, part]})


def test_template_environment_is_that_of_transformers() -> None:
    """tests/oracle compares complete templates."""

    def render(template: str, *messages: dict[str, Any]) -> str:
        return chat_template.render_chat_template(template, list(messages), {"bos_token": "<s>"})

    loop = "{% for n in range(5) %}{% if n == 2 %}{% continue %}{% endif %}{{ n }}{% if n == 3 %}"
    assert render(loop + "{% break %}{% endif %}{% endfor %}") == "013"
    assert render("a{% generation %}{% set b = 1 %}{{ b }}{% endgeneration %}{{ b }}") == "a1"
    assert render("{{ {'b': '<é>', 'a': bos_token} | tojson }}") == '{"b": "<é>", "a": "<s>"}'
    assert render("{{ 'é' | tojson(ensure_ascii=true) }}") == '"\\u00e9"'
    assert render("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}") == (
        "TrueTrueTrue"
    )
    years = [datetime.now().year, datetime.now().year + 1]
    assert render("{{ strftime_now('%Y') }}") in map(str, years)
    assert render("{{ messages[0] | tojson }}", {"b": 1, "a": 2}) == '{"b": 1, "a": 2}'
    message = {"role": "assistant", "content": "", "reasoning": "hm"}
    assert render("{{ messages[0].reasoning_content }}", message) == "hm"
    with pytest.raises(UserError, match="rejected the messages: take turns"):
        render("{{ raise_exception('take turns') }}")
    with pytest.raises(UserError, match="underscore"):
        render("{{ namespace(_a=1) }}")


def test_fields_of_a_message_keep_their_order() -> None:
    template = "{{ messages[0] | tojson }}"
    message = {"name": "Ann", "content": "hi", "role": "user", "tool_calls": None}
    expected = '{"name": "Ann", "content": "hi", "role": "user"}'
    assert encode(template, message) == TOKENIZER.encode(expected).tolist()


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
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ messages[0].content | tojson(indent='a'.b.c) }}",
    ],
)
def test_hostile_or_invalid_template_raises_an_error(template: str) -> None:
    with pytest.raises(UserError, match=r"failed to render|is not usable"):
        encode(template, {"role": "user", "content": "a"})
