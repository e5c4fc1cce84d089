"""Responses of `/v1/completions` and `/v1/chat/completions`, complete or in chunks."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenLogprob:
    """Token with its log-probability.

    Attributes:
        content: the token's bytes, possibly only part of a UTF-8 character.
        logprob: None for the first token of a text.
        top_logprobs: (bytes, log-probability) of the most likely tokens here, in descending order.
        offset: offset of the token in the text, in characters.
    """

    content: bytes
    logprob: float | None
    top_logprobs: list[tuple[bytes, float]]
    offset: int


@dataclass(frozen=True)
class TextDelta:
    """New text of one choice.

    Attributes:
        index: index of the choice.
        num_tokens: number of sampled tokens.
        finish_reason: "stop" or "length" if the choice ends here, else None.
        tokens: tokens with log-probabilities, if requested.
    """

    index: int
    text: str
    num_tokens: int = 0
    finish_reason: str | None = None
    tokens: list[TokenLogprob] = field(default_factory=list)


class ResponseBuilder(ABC):
    """Builds the JSON of responses to one request.

    Args:
        model: name of the model.
        num_top_logprobs: number of most likely tokens to return per position; None: no
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
        """Build a response, or a chunk of a streamed one."""
        return self._common_fields | {
            "object": self.chunk_object_type if streamed else self.object_type,
            "choices": choices,
        }

    @abstractmethod
    def build_choice(self, index: int, deltas: list[TextDelta]) -> dict[str, Any]:
        """Build a complete choice."""

    @abstractmethod
    def build_delta_choice(self, delta: TextDelta) -> dict[str, Any]:
        """Build the choice of a chunk, with only the new text."""


class CompletionResponseBuilder(ResponseBuilder):
    """Builds responses of `/v1/completions`."""

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
        """Log-probabilities of the most likely tokens, and of the token itself."""
        if token.logprob is None:
            return None
        top = [*token.top_logprobs[: self._num_top_logprobs], (token.content, token.logprob)]
        return {_decode_token(content, "bytes:"): logprob for content, logprob in top}


class ChatResponseBuilder(ResponseBuilder):
    """Builds responses of `/v1/chat/completions`."""

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
    """Build the `usage` of a response: token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _decode_token(content: bytes, prefix: str = "") -> str:
    """A token's text; if it is not valid UTF-8, its bytes, escaped as in OpenAI's API."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in content)
