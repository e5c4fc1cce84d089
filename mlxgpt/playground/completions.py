"""The door for other programs: `/v1/models`, `/v1/completions`, `/v1/chat/completions`, as OpenAI's
API has them (platform.openai.com/docs/api-reference), with one model: the run that is played.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mlxgpt import config
from mlxgpt.errors import UserError
from mlxgpt.loaded import Model
from mlxgpt.playground import access, chat
from mlxgpt.playground.asked import MOST_TOKENS, Asked
from mlxgpt.playground.models import Models
from mlxgpt.playground.sharing import Device

MOST_TEXTS = 16  # of one request
MOST_LOGPROBS = 20
LEAST = 1e-30  # probability whose logarithm is told
# Of OpenAI's API, but not here: whoever asks for them has to know.
WITHOUT = ("suffix", "logit_bias", "tools", "functions", "response_format", "audio", "modalities")
ZERO = ("presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class _Wanted:
    """A request: prompts, how many texts of each, and how they are drawn."""

    prompts: list[str | list[int]]
    n: int
    sampling: dict[str, Any]
    logprobs: int | None
    echo: bool
    stream: bool
    usage: bool


@dataclass(frozen=True)
class _Piece:
    """What is new of one of a request's texts."""

    index: int
    text: str
    tokens: int
    finish: str | None
    logprob: tuple[str, float, list[tuple[str, float]]] | None = None
    offset: int = 0


def routes(models: Models, device: Device) -> list[Route]:
    """Those of the API."""
    door = _Door(models, device)
    return [
        Route("/v1/models", door.models),
        Route("/v1/models/{name:path}", door.model),
        Route("/v1/completions", door.completions, methods=["POST"]),
        Route("/v1/chat/completions", door.chat, methods=["POST"]),
    ]


class _Door:
    def __init__(self, models: Models, device: Device) -> None:
        self._models, self._device = models, device
        self._name = models.folder.name
        self._began = int(time.time())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._began,
            "owned_by": "mlxgpt",
        }

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """It, by its name."""
        name = request.path_params["name"]
        return JSONResponse(self._card()) if name == self._name else self._another()

    def _another(self) -> Response:
        return access.error(404, "there is no such model", f"the one here is {self._name!r}.")

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        asked = await Asked.of(request)
        if asked.text("model") != self._name:
            return self._another()
        wanted = _wanted(asked, _prompts(asked), 16)
        return await self._answer(wanted, _Completion(self._name, wanted))

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, by the run's own template."""
        asked = await Asked.of(request)
        if asked.text("model") != self._name:
            return self._another()
        template = chat.template_of(self._models.opened())
        messages = chat.checked(asked.tree.get("messages"))

        def ids() -> list[int]:
            return chat.ids(template, messages, self._models.at())

        wanted = _wanted(asked, [await self._device.call(ids)], 512)
        return await self._answer(wanted, _Chat(self._name, wanted))

    async def _answer(self, wanted: _Wanted, form: _Form) -> Response:
        lengths: list[int] = []

        def pieces() -> Iterator[_Piece | None]:
            model = self._models.at()
            prompts = [p if isinstance(p, list) else model.ids(p).tolist() for p in wanted.prompts]
            lengths.extend(map(len, prompts))
            yield None  # from here on nothing is refused
            index = 0
            for prompt in prompts:
                for number in range(wanted.n):
                    yield from _written(model, prompt, number, index, wanted)
                    index += 1

        _, rest = await self._device.begun(pieces)
        if wanted.stream:
            events = _events(rest, form, wanted, lengths)
            return StreamingResponse(events, media_type="text/event-stream")
        found: dict[int, list[_Piece]] = {}
        async with aclosing(rest):
            async for piece in rest:
                found.setdefault(piece.index, []).append(piece)
        choices = [form.whole(index, parts) for index, parts in found.items()]
        used = sum(piece.tokens for parts in found.values() for piece in parts)
        return JSONResponse(form.tree(choices) | {"usage": _usage(lengths, used)})


def _written(
    model: Model, prompt: list[int], number: int, index: int, wanted: _Wanted
) -> Iterator[_Piece]:
    """One text, the one that `generate` writes with this seed."""
    finish, offset = "length", 0
    if wanted.echo:
        text = model.tokenizer.decode(prompt)
        offset = len(text)
        yield _Piece(index, text, 0, None)
    count = max(1, wanted.logprobs or 0) if wanted.logprobs is not None else 0
    for drawn in model.tokens(prompt, number=number, alternatives=count, **wanted.sampling):
        told = None
        if drawn.probability is not None:
            others = drawn.alternatives[: wanted.logprobs]
            told = (
                _named(model, drawn.id),
                _log(drawn.probability),
                [(_named(model, id), _log(share)) for id, share in others],
            )
        finish = "stop" if drawn.ended else "length"
        yield _Piece(index, drawn.text, 1, None, told, offset)
        offset += len(drawn.text)
    yield _Piece(index, "", 0, finish)


async def _events(
    pieces: AsyncGenerator[_Piece, None], form: _Form, wanted: _Wanted, lengths: list[int]
) -> AsyncIterator[str]:
    used = 0
    usage = {"usage": None} if wanted.usage else {}
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                used += piece.tokens
                if piece.text or piece.finish or piece.logprob:
                    tree = form.tree([form.part(piece)], streamed=True) | usage
                    yield f"data: {json.dumps(tree)}\n\n"
        except UserError as error:
            yield access.late(error)
            return
    if wanted.usage:
        tree = form.tree([], streamed=True) | {"usage": _usage(lengths, used)}
        yield f"data: {json.dumps(tree)}\n\n"
    yield "data: [DONE]\n\n"


class _Form:
    """How an answer is written."""

    kind: str
    prefix: str

    def __init__(self, model: str, wanted: _Wanted) -> None:
        self._model, self._wanted = model, wanted
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def tree(self, choices: list[dict[str, Any]], *, streamed: bool = False) -> dict[str, Any]:
        """An answer, or a chunk of one, with its choices."""
        return {
            "id": self._id,
            "object": self.kind + (".chunk" if streamed and self.prefix == "chatcmpl" else ""),
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def whole(self, index: int, parts: list[_Piece]) -> dict[str, Any]:
        """A text as a choice."""
        raise NotImplementedError

    def part(self, piece: _Piece) -> dict[str, Any]:
        """What is new of a text, as a choice."""
        raise NotImplementedError


class _Completion(_Form):
    kind, prefix = "text_completion", "cmpl"

    def whole(self, index: int, parts: list[_Piece]) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(part.text for part in parts),
            "finish_reason": parts[-1].finish,
            "logprobs": self._logprobs(parts),
        }

    def part(self, piece: _Piece) -> dict[str, Any]:
        return self.whole(piece.index, [piece])

    def _logprobs(self, parts: list[_Piece]) -> dict[str, Any] | None:
        told = [part.logprob for part in parts if part.logprob]
        if self._wanted.logprobs is None:
            return None
        return {
            "tokens": [name for name, _, _ in told],
            "token_logprobs": [value for _, value, _ in told],
            "top_logprobs": [dict(others) for _, _, others in told],
            "text_offset": [part.offset for part in parts if part.logprob],
        }


class _Chat(_Form):
    kind, prefix = "chat.completion", "chatcmpl"

    def whole(self, index: int, parts: list[_Piece]) -> dict[str, Any]:
        text = "".join(part.text for part in parts)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": parts[-1].finish,
            "logprobs": self._logprobs(parts),
        }

    def part(self, piece: _Piece) -> dict[str, Any]:
        delta = {"role": "assistant", "content": piece.text} if not piece.finish else {}
        return {
            "index": piece.index,
            "delta": delta,
            "finish_reason": piece.finish,
            "logprobs": self._logprobs([piece]),
        }

    def _logprobs(self, parts: list[_Piece]) -> dict[str, Any] | None:
        if self._wanted.logprobs is None:
            return None

        def one(name: str, value: float) -> dict[str, Any]:
            return {"token": name, "logprob": value, "bytes": list(name.encode())}

        return {
            "content": [
                one(name, value) | {"top_logprobs": [one(*other) for other in others]}
                for part in parts
                if part.logprob
                for name, value, others in [part.logprob]
            ],
            "refusal": None,
        }


def _usage(lengths: list[int], used: int) -> dict[str, int]:
    read = sum(lengths)
    return {"prompt_tokens": read, "completion_tokens": used, "total_tokens": read + used}


def _prompts(asked: Asked) -> list[str | list[int]]:
    """A text, several, ids, or several lists of them."""
    prompt = asked.tree.get("prompt", "")
    if isinstance(prompt, str):
        return [asked.text("prompt", "")]
    if isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
        return [asked.whole_numbers("prompt")]
    if not isinstance(prompt, list) or not 0 < len(prompt) <= MOST_TEXTS:
        raise UserError("prompt cannot be that", f"send a text, or up to {MOST_TEXTS}.")
    parts = [Asked({"prompt": one}) for one in prompt]
    return [
        part.whole_numbers("prompt")
        if isinstance(part.tree["prompt"], list)
        else part.text("prompt")
        for part in parts
    ]


def _wanted(asked: Asked, prompts: list[str | list[int]], length: int) -> _Wanted:
    """A request's settings, OpenAI's names and defaults; top_k, min_p and repetition_penalty as
    other servers have them.
    """
    tree = asked.tree
    for name in WITHOUT:
        if tree.get(name):
            raise UserError(f"{name} is not known here", "leave it out.")
    for name in ZERO:
        if asked.number(name):
            raise UserError(f"{name} is not known here", "use repetition_penalty.")
    n = asked.whole("n", 1, MOST_TEXTS, 1)
    if n * len(prompts) > MOST_TEXTS or asked.whole("best_of", 1, MOST_TEXTS, n) != n:
        raise UserError("these are too many texts", f"ask for up to {MOST_TEXTS}, without best_of.")
    stop = tree.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stop, list)
        or len(stop) > 4
        or not all(isinstance(s, str) and 0 < len(s) <= 1000 for s in stop)
    ):
        raise UserError("stop cannot be that", "send a text, or up to four.")
    limit = "max_completion_tokens" if tree.get("max_completion_tokens") else "max_tokens"
    numbers = {name: asked.number(name) for name in ("top_p", "min_p", "repetition_penalty")}
    temperature = asked.number("temperature")
    chosen: dict[str, Any] = {
        "max_tokens": asked.whole(limit, 1, MOST_TOKENS, length),
        "temperature": 1.0 if temperature is None else temperature,
        "top_k": asked.whole("top_k", 0, 1 << 31, 0),
        "seed": asked.whole("seed", 0, (1 << 63) - 1, secrets.randbelow(1 << 31)),
        "stop": tuple(stop),
    } | {name: value for name, value in numbers.items() if value is not None}
    config.sampling(chosen)
    options = tree.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise UserError("stream_options is no object", "leave it out.")
    return _Wanted(
        prompts,
        n,
        chosen,
        _logprobs_asked(asked),
        asked.yes("echo"),
        asked.yes("stream"),
        bool(options.get("include_usage")),
    )


def _logprobs_asked(asked: Asked) -> int | None:
    """A number in completions, yes and a number in chats."""
    value = asked.tree.get("logprobs")
    if value is None or value is False:
        return None
    name = "top_logprobs" if value is True else "logprobs"
    return asked.whole(name, 0, MOST_LOGPROBS, 0)


def _named(model: Model, id: int) -> str:
    return model.tokenizer.token_bytes(id).decode("utf-8", "replace")


def _log(share: float) -> float:
    return float(np.log(max(share, LEAST)))
