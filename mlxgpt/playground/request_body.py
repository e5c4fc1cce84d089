"""Request bodies: JSON, parsed into pydantic models that give each field its type and bounds."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from starlette.requests import Request

from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

MOST_CHARACTERS = 100_000  # of a prompt
MOST_IDS = 20_000
MOST_TOKENS = 4_000  # of one text
MOST_TEXTS = 16  # of one request
MOST_LOGPROBS = 20
MOST_MESSAGES = 200
MOST_FIELDS = 200
DEEPEST = 50  # levels of lists and objects
MOST_SHOWN = 60  # characters of a value in an error message
ROLES = ("system", "developer", "user", "assistant")

B = TypeVar("B", bound="Body")


def _stops(value: Any) -> Any:
    """A single stop string as a list of one; an empty one as none."""
    return [value] * bool(value) if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    """A single prompt, text or ids, as a list of one."""
    is_ids = isinstance(value, list) and value and all(type(id) is int for id in value)
    return [value] if isinstance(value, str) or is_ids else value


def _joined(content: Any) -> Any:
    """The text of a message's content, which may be a list of parts. Parts that are not text stay
    as they are, and are refused.
    """
    if not isinstance(content, list):
        return content
    texts = [
        part["text"]
        for part in content
        if isinstance(part, dict)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    ]
    return "".join(texts) if len(texts) == len(content) else content


def _string(default: Any) -> Any:
    allowed = f"a string of at most {MOST_CHARACTERS:,} characters"
    return Field(default, max_length=MOST_CHARACTERS, description=allowed)


def _integer(default: int | None, low: int, high: int) -> Any:
    allowed = f"a whole number from {low:,} to {high:,}"
    return Field(default, ge=low, le=high, description=allowed)


def _number() -> Any:
    return Field(None, description="a number")


def _boolean() -> Any:
    return Field(False, description="true or false")


Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=MOST_IDS)]
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1_000)]], BeforeValidator(_stops)
]


class Body(BaseModel):
    """Fields of a request. One that is null has its default."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _without_nulls(cls, tree: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(tree, dict):
            tree = {name: value for name, value in tree.items() if value is not None}
        body = validate(tree)
        body._sent = tree
        return body

    @property
    def sent(self) -> dict[str, Any]:
        """All fields but those that are null, as they were sent, in their order."""
        return self._sent


class SamplingBody(Body):
    """Settings of sampling. Their bounds are those of `config.Sampling`."""

    temperature: float | None = _number()
    top_p: float | None = _number()
    top_k: int = _integer(0, 0, 1 << 31)
    min_p: float | None = _number()
    repetition_penalty: float | None = _number()

    def settings(self) -> dict[str, Any]:
        """Those that the request sets, by their names in `config.Sampling`."""
        values = {name: getattr(self, name) for name in SamplingBody.model_fields}
        return {name: value for name, value in values.items() if value is not None}


class PageBody(SamplingBody):
    """A request of the page."""

    text: str = _string("")
    ids: Ids = Field([], description=f"a list of at most {MOST_IDS:,} token ids")
    step: int | None = _integer(None, 0, 10**18)
    max_tokens: int = _integer(200, 1, MOST_TOKENS)
    seed: int | None = _integer(None, 0, (1 << 53) - 1)
    off: Ids = Field([], description="a list of the numbers of heads")
    layer: int = _integer(0, 0, 1 << 31)
    position: int | None = _integer(None, 0, 1 << 31)
    id: int = _integer(0, 0, 1 << 31)


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False


class GenerationBody(SamplingBody):
    """What OpenAI's endpoints have in common; top_k, min_p and repetition_penalty have the names
    that other servers give them.
    """

    model: str = _string(...)
    n: int = _integer(1, 1, MOST_TEXTS)
    best_of: int | None = _integer(None, 1, MOST_TEXTS)
    seed: int | None = _integer(None, 0, (1 << 63) - 1)
    stop: StopStrings = Field(
        [], max_length=4, description="a string of 1 to 1,000 characters, or up to 4 of them"
    )
    stream: bool = _boolean()
    max_completion_tokens: int = _integer(0, 0, MOST_TOKENS)  # 0: max_tokens
    stream_options: Annotated[StreamOptions, BeforeValidator(lambda value: value or {})] = Field(
        StreamOptions(), description='an object, such as {"include_usage": true}'
    )
    logprobs: bool | Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] = Field(
        False, description=f"true or false, or a whole number from 0 to {MOST_LOGPROBS}"
    )
    top_logprobs: int = _integer(0, 0, MOST_LOGPROBS)

    @property
    def alternatives(self) -> int | None:
        """How many of the most likely tokens to return for each place; None: no log-probabilities
        at all.
        """
        if isinstance(self.logprobs, bool):
            return self.top_logprobs if self.logprobs else None
        return self.logprobs

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.best_of not in (None, self.n):
            raise UserError(
                f"best_of = {self.best_of} is not supported", "use n instead, without best_of."
            )
        if self.top_logprobs and self.logprobs is not True:
            raise UserError("top_logprobs needs logprobs", 'add "logprobs": true.')
        return self


class CompletionBody(GenerationBody):
    """A request of `/v1/completions`."""

    prompt: Annotated[list[Text | Ids], BeforeValidator(_prompts)] = Field(
        [""],
        min_length=1,
        max_length=MOST_TEXTS,
        description=f"a string, a list of token ids, or up to {MOST_TEXTS} of these, each of at "
        f"most {MOST_CHARACTERS:,} characters or {MOST_IDS:,} ids",
    )
    max_tokens: int = _integer(16, 0, MOST_TOKENS)
    echo: bool = _boolean()


class Message(Body):
    """A message of a conversation. Fields with other names are for the template."""

    role: Literal[ROLES]  # type: ignore[valid-type]
    content: Annotated[str, BeforeValidator(_joined)]


class ChatBody(GenerationBody):
    """A request of `/v1/chat/completions`."""

    messages: list[Message] = Field(
        min_length=1,
        max_length=MOST_MESSAGES,
        description=f"1 to {MOST_MESSAGES} messages, each with a role ({', '.join(ROLES)}) and a "
        "content of text alone",
    )
    max_tokens: int = _integer(512, 1, MOST_TOKENS)


async def parse(request: Request, kind: type[B]) -> B:
    """A request's body.

    Raises:
        UserError: if it is not JSON, or a field has another type or is out of bounds.
    """
    try:
        tree = files.parse_json((await request.body()).decode())
    except ValueError as error:
        raise UserError("the body is not valid JSON", "send an object, such as {}.") from error
    if not isinstance(tree, dict):
        raise UserError("the body is not a JSON object", "send one, such as {}.")
    if len(tree) > MOST_FIELDS:
        raise UserError(f"the body has {len(tree):,} fields", f"send at most {MOST_FIELDS}.")
    _check_strings(tree, "", 0)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = str(first["loc"][0])
        # Of a prompt the whole is shown: what pydantic names of it was prepared for the check.
        path, value = _located(tree, first["loc"] if name == "messages" else (name,))
        if first["type"] == "missing":
            path, value = (f"{path}.{first['loc'][-1]}" if path else name), None
        raise invalid(path, value, kind.model_fields[name].description or "") from error


def invalid(name: str, value: Any, allowed: str) -> UserError:
    """The error for a field with a value that it cannot have; None: for one that is missing."""
    problem = "is missing" if value is None else f"= {show_value(value)} is not valid"
    return UserError(f"{name} {problem}", f"send {allowed}.")


def show_value(value: Any) -> str:
    """A value in ASCII, shortened."""
    line = json.dumps(value)
    return line if len(line) <= MOST_SHOWN else f"{line[: MOST_SHOWN - 1]}…"


def _located(tree: Any, keys: tuple[int | str, ...]) -> tuple[str, Any]:
    """The part of a tree that pydantic names, as far as there is one: it also names the types that
    it tried.
    """
    path, value = "", tree
    for key in keys:
        if isinstance(value, dict) and value.get(str(key)) is not None:
            path += f".{key}" if path else str(key)
            value = value[str(key)]
        elif isinstance(value, list) and isinstance(key, int):
            path += f"[{key}]"
            value = value[key]
        else:
            break
    return path, value


def _check_strings(value: Any, path: str, depth: int) -> None:
    """Refuse half a surrogate pair anywhere in a tree, since UTF-8 cannot hold one though JSON can
    escape it; and a tree that is too deep.
    """
    if isinstance(value, str) and (half := re.search("[\ud800-\udfff]", value)):
        raise UserError(
            f"{path} has half a surrogate pair, U+{ord(half[0]):04X}, as character "
            f"{half.start() + 1:,}",
            "send whole characters: in UTF-8, or both halves of the pair.",
        )
    if depth > DEEPEST:
        raise UserError("the body is nested too deeply", f"use at most {DEEPEST} levels.")
    if isinstance(value, list):
        for n, item in enumerate(value):
            _check_strings(item, f"{path}[{n}]", depth + 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_strings(name, "the name of a field", depth)
            _check_strings(item, f"{path}.{name}" if path else name, depth + 1)
