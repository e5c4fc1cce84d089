"""Request bodies: JSON validated by pydantic models."""

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

from mlxgpt.utils import json_files
from mlxgpt.utils.errors import UserError

MAX_PROMPT_CHARS = 100_000
MAX_IDS = 20_000  # token ids per prompt
MAX_NEW_TOKENS = 4_000  # per choice
MAX_CHOICES = 16  # per request


def _as_stop_list(value: Any) -> Any:
    """Wrap a single stop string in a list; an empty string becomes an empty list."""
    return [value] * bool(value) if isinstance(value, str) else value


def _as_prompt_list(value: Any) -> Any:
    """Wrap a single prompt, a string or token ids, in a list."""
    is_ids = isinstance(value, list) and value and all(type(id) is int for id in value)
    return [value] if isinstance(value, str) or is_ids else value


def _join_text_parts(content: Any) -> Any:
    """Join a message's content if it is a list of text parts.

    A list with other parts is returned unchanged; validation then rejects it.
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


def _string_field(default: Any) -> Any:
    allowed = f"a string of at most {MAX_PROMPT_CHARS:,} characters"
    return Field(default, max_length=MAX_PROMPT_CHARS, description=allowed)


def _integer_field(default: int | None, low: int, high: int) -> Any:
    allowed = f"an integer from {low:,} to {high:,}"
    return Field(default, ge=low, le=high, description=allowed)


def _number_field() -> Any:
    return Field(None, description="a number")


def _boolean_field() -> Any:
    return Field(False, description="true or false")


PromptText = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=MAX_IDS)]
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1_000)]], BeforeValidator(_as_stop_list)
]


class RequestModel(BaseModel):
    """Base class of requests. Fields that are null get their defaults."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    _raw_fields: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _drop_nulls(cls, fields: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(fields, dict):
            fields = {name: value for name, value in fields.items() if value is not None}
        body = validate(fields)
        body._raw_fields = fields
        return body

    @property
    def raw_fields(self) -> dict[str, Any]:
        """All fields that are not null, unvalidated and in the order they were sent."""
        return self._raw_fields


class SamplingRequest(RequestModel):
    """Sampling parameters; `config.parse_sampling_params` checks the bounds of the floats."""

    temperature: float | None = _number_field()
    top_p: float | None = _number_field()
    top_k: int = _integer_field(0, 0, 1 << 31)
    min_p: float | None = _number_field()
    repetition_penalty: float | None = _number_field()

    def sampling_params(self) -> dict[str, Any]:
        """The parameters that are set, as keyword arguments of `config.SamplingParams`."""
        return self.model_dump(include=set(SamplingRequest.model_fields), exclude_none=True)


class StreamOptions(RequestModel):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


MAX_LOGPROBS = 20


class GenerationRequest(SamplingRequest):
    """Fields common to `/v1/completions` and `/v1/chat/completions`.

    OpenAI has no top_k, min_p and repetition_penalty; the names are those of other servers.
    """

    model: str = _string_field(...)
    n: int = _integer_field(1, 1, MAX_CHOICES)
    best_of: int | None = _integer_field(None, 1, MAX_CHOICES)
    seed: int | None = _integer_field(None, 0, (1 << 63) - 1)
    stop: StopStrings = Field(
        [], max_length=4, description="a string of 1 to 1,000 characters, or up to 4 of them"
    )
    stream: bool = _boolean_field()
    max_completion_tokens: int = _integer_field(0, 0, MAX_NEW_TOKENS)  # 0: max_tokens
    stream_options: Annotated[StreamOptions, BeforeValidator(lambda value: value or {})] = Field(
        StreamOptions(), description='an object, such as {"include_usage": true}'
    )
    logprobs: bool | Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = Field(
        False, description=f"true or false, or an integer from 0 to {MAX_LOGPROBS}"
    )
    top_logprobs: int = _integer_field(0, 0, MAX_LOGPROBS)

    @property
    def num_top_logprobs(self) -> int | None:
        """Number of most likely tokens to return per position; None: no log-probabilities."""
        if isinstance(self.logprobs, bool):
            return self.top_logprobs if self.logprobs else None
        return self.logprobs

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.best_of not in (None, self.n):
            raise UserError(f"best_of = {self.best_of} is not supported", "use n without best_of.")
        if self.top_logprobs and self.logprobs is not True:
            raise UserError("top_logprobs needs logprobs", 'add "logprobs": true.')
        return self


class CompletionRequest(GenerationRequest):
    """Request of `/v1/completions`."""

    prompt: Annotated[list[PromptText | TokenIds], BeforeValidator(_as_prompt_list)] = Field(
        [""],
        min_length=1,
        max_length=MAX_CHOICES,
        description=f"a string, a list of token ids, or up to {MAX_CHOICES} of these, each of at "
        f"most {MAX_PROMPT_CHARS:,} characters or {MAX_IDS:,} ids",
    )
    max_tokens: int = _integer_field(16, 0, MAX_NEW_TOKENS)
    echo: bool = _boolean_field()


ROLES = ("system", "developer", "user", "assistant")


class ChatMessage(RequestModel):
    """Chat message. Additional fields are passed to the chat template."""

    role: Literal[ROLES]  # type: ignore[valid-type]
    content: Annotated[str, BeforeValidator(_join_text_parts)]

    @property
    def fields(self) -> dict[str, Any]:
        """All fields, for the chat template."""
        return self.raw_fields | {"content": self.content}


MAX_MESSAGES = 200


class UIRequest(SamplingRequest):
    """Request of the web UI."""

    text: str = _string_field("")
    ids: TokenIds = Field([], description=f"a list of at most {MAX_IDS:,} token ids")
    messages: list[ChatMessage] = Field(
        [], max_length=MAX_MESSAGES, description=f"a list of at most {MAX_MESSAGES} messages"
    )
    step: int | None = _integer_field(None, 0, 10**18)
    max_tokens: int = _integer_field(200, 1, MAX_NEW_TOKENS)
    seed: int | None = _integer_field(None, 0, (1 << 53) - 1)
    disabled_heads: TokenIds = Field([], description="a list of head numbers")
    layer: int = _integer_field(0, 0, 1 << 31)
    position: int | None = _integer_field(None, 0, 1 << 31)
    token_id: int = _integer_field(0, 0, 1 << 31)
    reference: bool = _boolean_field()


class ChatCompletionRequest(GenerationRequest):
    """Request of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description=f"1 to {MAX_MESSAGES} messages, each with a role ({', '.join(ROLES)}) and "
        "text-only content",
    )
    max_tokens: int = _integer_field(512, 1, MAX_NEW_TOKENS)


MAX_FIELDS = 200  # limits the time spent searching for similar names
RequestT = TypeVar("RequestT", bound=RequestModel)


async def parse_request(request: Request, model_class: type[RequestT]) -> RequestT:
    """Parse and validate a request's body.

    Raises:
        UserError: if it is not a JSON object, or a field has the wrong type or is out of bounds.
    """
    try:
        tree = json_files.parse_json((await request.body()).decode())
    except ValueError as error:
        raise UserError("the body is not valid JSON", "send an object, such as {}.") from error
    if not isinstance(tree, dict):
        raise UserError("the body is not a JSON object", "send one, such as {}.")
    if len(tree) > MAX_FIELDS:
        raise UserError(f"the body has {len(tree):,} fields", f"send at most {MAX_FIELDS}.")
    _check_tree(tree, "", 0)
    try:
        return model_class.model_validate(tree)
    except ValidationError as error:
        first_error = error.errors(include_url=False, include_context=False)[0]
        name = str(first_error["loc"][0])
        # Show other fields whole: the error's location may refer to a validator's output.
        path, value = _locate_value(tree, first_error["loc"] if name == "messages" else (name,))
        if first_error["type"] == "missing":
            path, value = (f"{path}.{first_error['loc'][-1]}" if path else name), None
        raise invalid_field_error(
            path, value, model_class.model_fields[name].description or ""
        ) from error


def invalid_field_error(name: str, value: Any, allowed: str) -> UserError:
    """Create the error for a field whose value is not allowed; None: the field is missing."""
    problem = "is missing" if value is None else f"= {format_value(value)} is not valid"
    return UserError(f"{name} {problem}", f"send {allowed}.")


MAX_VALUE_CHARS = 60  # in an error message


def format_value(value: Any) -> str:
    """Format a value as ASCII JSON, truncated to MAX_VALUE_CHARS."""
    line = json.dumps(value)
    return line if len(line) <= MAX_VALUE_CHARS else f"{line[: MAX_VALUE_CHARS - 1]}…"


def _locate_value(tree: Any, keys: tuple[int | str, ...]) -> tuple[str, Any]:
    """Find the path and value of a pydantic error location in a JSON tree.

    Its last keys may be names of types that pydantic tried; they are ignored.
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


MAX_DEPTH = 50  # levels of lists and objects


def _check_tree(value: Any, path: str, depth: int) -> None:
    """Reject trees that are nested too deeply or contain an unpaired surrogate.

    JSON can escape an unpaired surrogate, but UTF-8 cannot encode it.
    """
    if isinstance(value, str) and (surrogate := re.search("[\ud800-\udfff]", value)):
        raise UserError(
            f"{path} has an unpaired surrogate, U+{ord(surrogate[0]):04X}, at character "
            f"{surrogate.start() + 1:,}",
            "send valid Unicode: UTF-8, or both halves of the surrogate pair.",
        )
    if depth > MAX_DEPTH:
        raise UserError("the body is nested too deeply", f"use at most {MAX_DEPTH} levels.")
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_tree(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_tree(name, "a field name", depth)
            _check_tree(item, f"{path}.{name}" if path else name, depth + 1)
