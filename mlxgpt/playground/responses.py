"""Answers of `/v1/completions` and `/v1/chat/completions`, whole or in chunks, as OpenAI's API
describes them.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Token:
    """A token of a text.

    Attributes:
        content: its bytes, which may be only a part of a character.
        logprob: None for a text's first token, which nothing precedes.
        top: (bytes, log-probability) of the most likely tokens in its place, falling.
        offset: of its first character in the text, in characters.
    """

    content: bytes
    logprob: float | None
    top: list[tuple[bytes, float]]
    offset: int


@dataclass(frozen=True)
class Piece:
    """What is new of one of a request's texts.

    Attributes:
        index: which text.
        drawn: how many tokens were drawn for it.
        finish: why the text ends here; None where it does not.
        tokens: with their log-probabilities, where these were asked for.
    """

    index: int
    text: str
    drawn: int = 0
    finish: str | None = None
    tokens: list[Token] = field(default_factory=list)


class Answer(ABC):
    """How a request's texts are written.

    Args:
        model: its name.
        alternatives: how many of the most likely tokens to return for each place; None: no
            log-probabilities at all.
    """

    kind: str
    chunk: str
    prefix: str

    def __init__(self, model: str, alternatives: int | None) -> None:
        self._alternatives = alternatives
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def tree(self, choices: list[dict[str, Any]], *, streamed: bool = False) -> dict[str, Any]:
        """An answer, or a chunk of one, with its choices."""
        return self._head | {"object": self.chunk if streamed else self.kind, "choices": choices}

    @abstractmethod
    def whole(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        """A text as a choice."""

    @abstractmethod
    def part(self, piece: Piece) -> dict[str, Any]:
        """What is new of a text, as a choice."""


class CompletionAnswer(Answer):
    """Of `/v1/completions`."""

    kind = chunk = "text_completion"
    prefix = "cmpl"

    def whole(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "finish_reason": pieces[-1].finish,
            "logprobs": self._logprobs([token for piece in pieces for token in piece.tokens]),
        }

    def part(self, piece: Piece) -> dict[str, Any]:
        return self.whole(piece.index, [piece])

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self._alternatives is None:
            return None
        return {
            "tokens": [_name(token.content, "bytes:") for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """The most likely tokens, and the token itself where it is not one of them."""
        if token.logprob is None:
            return None
        top = [*token.top[: self._alternatives], (token.content, token.logprob)]
        return {_name(content, "bytes:"): logprob for content, logprob in top}


class ChatAnswer(Answer):
    """Of `/v1/chat/completions`."""

    kind, chunk = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def whole(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": pieces[-1].finish,
            "logprobs": self._logprobs([token for piece in pieces for token in piece.tokens]),
        }

    def part(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.index,
            "delta": {} if piece.finish else {"role": "assistant", "content": piece.text},
            "finish_reason": piece.finish,
            "logprobs": self._logprobs(piece.tokens),
        }

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self._alternatives is None:
            return None

        def entry(content: bytes, logprob: float | None) -> dict[str, Any]:
            return {"token": _name(content), "logprob": logprob, "bytes": list(content)}

        content = [
            entry(token.content, token.logprob)
            | {"top_logprobs": [entry(*top) for top in token.top[: self._alternatives]]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def usage(prompt_tokens: int, drawn: int) -> dict[str, int]:
    """How many tokens a request took."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": drawn,
        "total_tokens": prompt_tokens + drawn,
    }


def _name(content: bytes, prefix: str = "") -> str:
    """A token's text; for a part of a character its bytes, escaped as OpenAI's API has them."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in content)
