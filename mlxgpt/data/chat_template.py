"""Chat templates: render a conversation as transformers does, and encode it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mlxgpt.data.normalize import normalize_text
from mlxgpt.data.tokenizers.base import (
    NUL,
    Tokenizer,
    encode_with_special_tokens,
    end_of_text_token,
)
from mlxgpt.utils.errors import UserError

CHAT_TEMPLATE = "chat_template.jinja"  # name of the file

# OpenAI's ChatML, which most open chat models use, with two special tokens.
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def encode_chat(
    template: str, messages: Iterable[Mapping[str, Any]], tokenizer: Tokenizer
) -> list[int]:
    """Encode a conversation as token ids, up to the start of the assistant's reply; may be empty.

    Args:
        messages: with the keys `role` and `content`, and any others that the template reads.

    Raises:
        UserError: if the template fails.
    """
    return encode_marked(render_marked(template, messages, tokenizer), tokenizer)


def split_conversation(template: str, tokenizer: Tokenizer) -> dict[str, str] | None:
    """Split a chat template into the texts around messages, with special tokens marked, for
    programs without Jinja: a conversation is `start`, the user's message, `answer`, the assistant's
    message, `question`, …; after the last message of the user follows `reply`. None if the template
    does not render every message in the same way.
    """
    names = [f"message{n}message" for n in range(5)]
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": name} for n, name in enumerate(names)
    ]
    try:
        texts = [
            render_marked(
                template, messages[:count], tokenizer, add_generation_prompt=count % 2 > 0
            )
            for count in (1, 3, 5)
        ]
    except UserError:
        return None
    parts = re.split("|".join(names), texts[-1])
    if len(parts) != len(names) + 1:
        return None
    start, answer, question = parts[:3]
    pieces = {"start": start, "answer": answer, "question": question, "reply": parts[-1]}
    for text, count in zip(texts, (1, 3, 5), strict=True):
        expected = start + names[0]
        for n, name in enumerate(names[1:count]):
            expected += (answer, question)[n % 2] + name
        if text != expected + pieces["reply"]:
            return None
    return pieces


def render_marked(
    template: str,
    messages: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Render a conversation as text in which special tokens are marked, for `encode_marked`.

    Args:
        add_generation_prompt: whether to add the start of the assistant's reply.

    Raises:
        UserError: if the template fails.
    """
    # NUL marks special tokens; removed from messages, so that only the template can insert them.
    conversation = [_strip_nul(dict(message)) for message in messages]
    eos_token = end_of_text_token(tokenizer)
    mark_special_tokens = tokenizer.added_tokens.mark_special_tokens
    token_names = () if eos_token is None else ("bos_token", "eos_token")
    special_tokens = dict.fromkeys(token_names, mark_special_tokens(eos_token or ""))
    text = render_chat_template(
        mark_special_tokens(template),
        conversation,
        {**special_tokens, "add_generation_prompt": add_generation_prompt},
    )
    return normalize_text(text)


def encode_marked(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encode text in which special tokens are marked.

    Raises:
        UserError: if a special token was split.
    """
    try:
        return encode_with_special_tokens(tokenizer, text)
    except ValueError as error:
        raise UserError(
            f"{CHAT_TEMPLATE} is not usable: it splits a special token",
            "fix the template.",
        ) from error


def render_chat_template(
    template: str, messages: list[dict[str, Any]], variables: Mapping[str, Any]
) -> str:
    """Render a conversation as text.

    Args:
        variables: other variables by their names in transformers, such as `bos_token`.

    Raises:
        UserError: if the template fails or rejects the messages.
    """
    try:
        return _compile_template(template).render(
            messages=list(map(_add_reasoning_keys, messages)),
            tools=None,
            documents=None,
            **{"add_generation_prompt": True, **variables},
        )
    except _TemplateRefusal as error:
        raise UserError(
            f"the chat template rejected the messages: {error}", "send messages it accepts."
        ) from error
    except Exception as error:  # a template can raise any exception
        problem = f"{CHAT_TEMPLATE} failed to render: {error}"
        raise UserError(problem, "fix the template.") from error


class _TemplateRefusal(TemplateError):
    """Raised when a template calls `raise_exception`."""


class _GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}`: marks the assistant's tokens for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the block's body into its own scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _SafeNamespace(Namespace):
    """Jinja namespace that rejects names starting with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_namespace_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_namespace_name(name)
        super().__setitem__(name, value)


def _check_namespace_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"the namespace has the name {name!r}, which begins with an underscore")


@lru_cache(maxsize=4)
def _compile_template(template: str) -> Template:
    return _create_environment().from_string(template)


def _create_environment() -> ImmutableSandboxedEnvironment:
    """Create a Jinja sandbox with the filters, globals and tags of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "namespace": _SafeNamespace,
    }
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Dump as JSON without Jinja's HTML escapes."""
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return text.replace(json.dumps(NUL)[1:-1], NUL)  # keep the marks of special tokens


def _raise_exception(message: str) -> None:
    raise _TemplateRefusal(message)


def _strip_nul(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(NUL, "")
    if isinstance(value, list):
        return [_strip_nul(item) for item in value]
    if isinstance(value, dict):
        return {_strip_nul(name): _strip_nul(item) for name, item in value.items()}
    return value


REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # in order of preference


def _add_reasoning_keys(message: dict[str, Any]) -> dict[str, Any]:
    """Add a message's reasoning under both names that templates read, as transformers does."""
    values = (message.get(name) for name in REASONING_KEYS)
    reasoning = next((value for value in values if value is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
