"""Responses of OpenAI's `/v1/completions` and `/v1/chat/completions`, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability.

    Attributes:
        content: its bytes, which may be only a part of a character.
        logprob: None for a text's first token.
        top_logprobs: (bytes, log-probability) of the likeliest tokens at its position, falling.
        offset: of its first character in the text, in characters.
    """

    content: bytes
    logprob: float | None
    top_logprobs: list[tuple[bytes, float]]
    offset: int


@dataclass(frozen=True)
class TextDelta:
    """New text of one choice.

    Attributes:
        index: of the choice.
        num_tokens: how many tokens were sampled for it.
        finish_reason: why the choice ends here; None if it does not.
        tokens: with their log-probabilities, if these were requested.
    """

    index: int
    text: str
    num_tokens: int = 0
    finish_reason: str | None = None
    tokens: list[TokenLogprob] = field(default_factory=list)


class ResponseBuilder(ABC):
    """Builds the JSON of a request's responses.

    Args:
        model: its name.
        num_top_logprobs: number of likeliest tokens to return at each position; None: no
            log-probabilities.
    """

    object_type: str
    chunk_object_type: str
    id_prefix: str

    def __init__(self, model: str, num_top_logprobs: int | None) -> None:
        self._num_top_logprobs = num_top_logprobs
        self._common_fields = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def build_response(
        self, choices: list[dict[str, Any]], *, streamed: bool = False
    ) -> dict[str, Any]:
        """A response, or a chunk of one, with its choices."""
        return self._common_fields | {
            "object": self.chunk_object_type if streamed else self.object_type,
            "choices": choices,
        }

    @abstractmethod
    def build_choice(self, index: int, deltas: list[TextDelta]) -> dict[str, Any]:
        """A whole choice."""

    @abstractmethod
    def build_delta_choice(self, delta: TextDelta) -> dict[str, Any]:
        """A chunk's choice, with new text alone."""


class CompletionResponseBuilder(ResponseBuilder):
    """Responses of `/v1/completions`."""

    object_type = chunk_object_type = "text_completion"
    id_prefix = "cmpl"

    def build_choice(self, index: int, deltas: list[TextDelta]) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(delta.text for delta in deltas),
            "finish_reason": deltas[-1].finish_reason,
            "logprobs": self._logprobs([token for delta in deltas for token in delta.tokens]),
        }

    def build_delta_choice(self, delta: TextDelta) -> dict[str, Any]:
        return self.build_choice(delta.index, [delta])

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any] | None:
        if self._num_top_logprobs is None:
            return None
        return {
            "tokens": [_decode_token(token.content, "bytes:") for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top_logprobs(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top_logprobs(self, token: TokenLogprob) -> dict[str, float] | None:
        """The likeliest tokens, and the token itself if it is not one of them."""
        if token.logprob is None:
            return None
        top = [*token.top_logprobs[: self._num_top_logprobs], (token.content, token.logprob)]
        return {_decode_token(content, "bytes:"): logprob for content, logprob in top}


class ChatResponseBuilder(ResponseBuilder):
    """Responses of `/v1/chat/completions`."""

    object_type, chunk_object_type = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def build_choice(self, index: int, deltas: list[TextDelta]) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": deltas[-1].finish_reason,
            "logprobs": self._logprobs([token for delta in deltas for token in delta.tokens]),
        }

    def build_delta_choice(self, delta: TextDelta) -> dict[str, Any]:
        return {
            "index": delta.index,
            "delta": {} if delta.finish_reason else {"role": "assistant", "content": delta.text},
            "finish_reason": delta.finish_reason,
            "logprobs": self._logprobs(delta.tokens),
        }

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any] | None:
        if self._num_top_logprobs is None:
            return None

        def entry(content: bytes, logprob: float | None) -> dict[str, Any]:
            return {"token": _decode_token(content), "logprob": logprob, "bytes": list(content)}

        def entry_with_top(token: TokenLogprob) -> dict[str, Any]:
            top = [entry(*pair) for pair in token.top_logprobs[: self._num_top_logprobs]]
            return entry(token.content, token.logprob) | {"top_logprobs": top}

        return {"content": list(map(entry_with_top, tokens)), "refusal": None}


def build_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """A response's `usage`: token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _decode_token(content: bytes, prefix: str = "") -> str:
    """A token's text; for a part of a character its bytes, escaped as in OpenAI's API."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in content)
