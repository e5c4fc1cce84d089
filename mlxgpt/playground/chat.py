"""A conversation as a prompt, by the template in a run's folder: `chat_template.jinja`, as Hugging
Face has it.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlxgpt import files
from mlxgpt.corpus.normalize import normalize_text
from mlxgpt.corpus.tokenizer import NUL, encode_marked, end_name
from mlxgpt.errors import UserError
from mlxgpt.loaded import Model
from mlxgpt.playground.asked import MOST_CHARACTERS
from mlxgpt.storage.run import CHAT_TEMPLATE, Run

MOST_MESSAGES = 200
ROLES = ("system", "developer", "user", "assistant")
Message = dict[str, str]


def template_of(run: Run) -> str:
    """A run's template.

    Raises:
        UserError: if it has none.
    """
    try:
        return files.read_small(run.folder / CHAT_TEMPLATE)
    except FileNotFoundError as error:
        raise UserError(
            f"{run.name} has no chat template, as it was not trained on conversations",
            "use /v1/completions.",
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{CHAT_TEMPLATE} of {run.name} cannot be read", "restore it.") from error


def checked(messages: Any) -> list[Message]:
    """The messages of a conversation, texts alone.

    Raises:
        UserError: if they are no such thing.
    """
    if not isinstance(messages, list) or not 0 < len(messages) <= MOST_MESSAGES:
        raise UserError("messages cannot be that", f"send 1 to {MOST_MESSAGES}.")
    found = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            content = "".join(
                part["text"]
                for part in content
                if isinstance(part, dict) and isinstance(part.get("text"), str)
            )
        if role not in ROLES or not isinstance(content, str):
            raise UserError(
                "a message cannot be that", f"send a role, of {', '.join(ROLES)}, and a content."
            )
        # Nobody but the template ends a text.
        found.append({"role": role, "content": content.replace(NUL, "")})
    if sum(len(message["content"]) for message in found) > MOST_CHARACTERS:
        raise UserError("messages are too long", f"send at most {MOST_CHARACTERS:,} characters.")
    return found


def ids(template: str, messages: list[Message], model: Model) -> list[int]:
    """A conversation's ids, up to where the assistant is to speak."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    tokenizer = model.tokenizer
    end = tokenizer.added.marked(end_name(tokenizer) or "")
    try:
        text = environment.from_string(tokenizer.added.marked(template)).render(
            messages=messages, add_generation_prompt=True, bos_token=end, eos_token=end
        )
        ids = encode_marked(tokenizer, normalize_text(text))
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(f"{CHAT_TEMPLATE} cannot be used: {error}", "mend it.") from error
    return ids or model.ids("").tolist()
