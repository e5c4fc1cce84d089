"""OpenAI's API: `/v1/models`, `/v1/completions`, `/v1/chat/completions`
(platform.openai.com/docs/api-reference), with one model: the run that is played.
"""

from __future__ import annotations

import codecs
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from mlxgpt import config
from mlxgpt.inference.generate import LONGEST_CHARACTER
from mlxgpt.inference.scoring import ScoredToken
from mlxgpt.loaded_model import LoadedModel
from mlxgpt.playground import auth, chat_template
from mlxgpt.playground.auth import FiniteJSONResponse
from mlxgpt.playground.models import Models
from mlxgpt.playground.request_body import (
    MOST_TEXTS,
    ChatBody,
    CompletionBody,
    GenerationBody,
    parse,
    show_value,
)
from mlxgpt.playground.responses import Answer, ChatAnswer, CompletionAnswer, Piece, Token, usage
from mlxgpt.playground.scheduler import Device
from mlxgpt.playground.unsupported_fields import unknown_fields
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

LEAST = 1e-30  # probability whose logarithm is returned
MOST_WARNINGS = 100
Prompt = str | list[int]


@dataclass(frozen=True)
class _Plan:
    """A request: prompts, and how they are continued."""

    body: GenerationBody
    prompts: list[Prompt]
    max_tokens: int
    sampling: dict[str, Any]
    echo: bool


def routes(models: Models, device: Device) -> list[Route]:
    """Routes of OpenAI's API."""
    endpoints = _Endpoints(models, device)
    return [
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{name:path}", endpoints.model),
        Route("/v1/completions", endpoints.completions, methods=["POST"]),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
    ]


class _Endpoints:
    def __init__(self, models: Models, device: Device) -> None:
        self._models, self._device = models, device
        self._name = models.folder.name
        self._began = int(time.time())
        self._unknown: set[str] = set()

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._began,
            "owned_by": "mlxgpt",
        }

    async def models(self, request: Request) -> Response:
        """The one model."""
        return FiniteJSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """It, by its name."""
        name = request.path_params["name"]
        return FiniteJSONResponse(self._card()) if name == self._name else self._another()

    def _another(self) -> Response:
        return auth.error(404, "there is no such model", f"the one here is {self._name!r}.")

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        body = await parse(request, CompletionBody)
        if body.model != self._name:
            return self._another()
        self._warn(unknown_fields(body))
        plan = _plan(body, body.prompt, body.max_completion_tokens or body.max_tokens, body.echo)
        return await self._answer(plan, CompletionAnswer(self._name, body.alternatives))

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, by the run's own template."""
        body = await parse(request, ChatBody)
        if body.model != self._name:
            return self._another()
        self._warn(unknown_fields(body))
        template = chat_template.template_of(self._models.opened())

        def ids() -> list[int]:
            return chat_template.ids(template, body.messages, self._models.at())

        prompt = await self._device.call(ids)
        plan = _plan(body, [prompt], body.max_completion_tokens or body.max_tokens, False)
        return await self._answer(plan, ChatAnswer(self._name, body.alternatives))

    def _warn(self, names: list[str]) -> None:
        """Log fields that are ignored, each once."""
        for name in names:
            if name not in self._unknown and len(self._unknown) < MOST_WARNINGS:
                self._unknown.add(name)
                logger.info(
                    "a request has the unknown field %s, which is ignored", show_value(name)
                )

    async def _answer(self, plan: _Plan, answer: Answer) -> Response:
        lengths: list[int] = []

        def pieces() -> Iterator[Piece | None]:
            model = self._models.at()
            prompts = [
                (p, (model.ids(p) if isinstance(p, str) else model.checked(p)).tolist())
                for p in plan.prompts
            ]
            lengths.extend(len(ids) for _, ids in prompts)
            yield None  # from here on nothing is refused
            index = 0
            for prompt, ids in prompts:
                echoed = (yield from _echoed(model, prompt, ids, plan)) if plan.echo else None
                for number in range(plan.body.n):
                    yield from _written(model, ids, number, index, plan, echoed)
                    index += 1

        _, rest = await self._device.begun(pieces)
        if plan.body.stream:
            events = _events(rest, answer, plan, lengths)
            return StreamingResponse(events, media_type="text/event-stream")
        texts: dict[int, list[Piece]] = {}
        async with aclosing(rest):
            async for piece in rest:
                if piece:
                    texts.setdefault(piece.index, []).append(piece)
        choices = [answer.whole(index, parts) for index, parts in texts.items()]
        drawn = sum(piece.drawn for parts in texts.values() for piece in parts)
        return FiniteJSONResponse(answer.tree(choices) | {"usage": usage(sum(lengths), drawn)})


def _plan(body: GenerationBody, prompts: list[Prompt], max_tokens: int, echo: bool) -> _Plan:
    """A request with its settings validated."""
    if body.n * len(prompts) > MOST_TEXTS:
        raise UserError(
            f"{len(prompts)} prompts with n = {body.n} are {body.n * len(prompts)} texts",
            f"ask for at most {MOST_TEXTS} texts in one request.",
        )
    sampling = {
        "temperature": 1.0,
        "max_tokens": max(1, max_tokens),
        "seed": secrets.randbelow(1 << 31) if body.seed is None else body.seed,
        "stop": tuple(body.stop),
    } | body.settings()
    config.sampling(sampling)
    return _Plan(body, prompts, max_tokens, sampling, echo)


def _echoed(
    model: LoadedModel, prompt: Prompt, ids: list[int], plan: _Plan
) -> Generator[None, None, tuple[str, list[Token]]]:
    """The prompt as it was sent, and its tokens with their log-probabilities, where these are asked
    for. The token that we put before a text is not part of it. Yields to let others have a turn.
    """
    tokenizer, count = model.tokenizer, plan.body.alternatives
    has_prefix = isinstance(prompt, str) and (
        not prompt or ids[0] in (model.run.bos, tokenizer.end_of_text)
    )
    scores: list[ScoredToken | None] = [None] * len(ids)
    if count is not None:
        scores = [None]
        for portion in model.score(ids, max(1, count)):
            scores += portion
            yield None
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    text, tokens = "", list[Token]()
    for id, score in list(zip(ids, scores, strict=True))[int(has_prefix) :]:
        logprob, top = None, list[tuple[bytes, float]]()
        if score and tokens:  # without a log-probability for the first
            logprob = score.logprob
            top = [(tokenizer.token_bytes(other), value) for other, value in score.alternatives]
        content = tokenizer.token_bytes(id)
        tokens.append(Token(content, logprob, top, len(text)))
        text += decode(content)
    if not plan.max_tokens:
        text += decode(b"", True)
    if isinstance(prompt, str) and prompt != text:
        places = aligned(text, prompt)
        tokens = [replace(token, offset=places[token.offset]) for token in tokens]
        text = prompt
    return text, tokens if count is not None else []


def aligned(normalized: str, sent: str) -> list[int]:
    """Where each character of a text, and its end, was before normalization, which removes
    characters or replaces one by another.
    """
    places, at = [], 0
    for character in normalized:
        places.append(min(at, len(sent)))
        is_removed = sent[at : at + 1] != character == sent[at + 1 : at + 2]
        at += 2 if is_removed else 1
    return [*places, len(sent)]


def _written(
    model: LoadedModel,
    ids: list[int],
    number: int,
    index: int,
    plan: _Plan,
    echoed: tuple[str, list[Token]] | None,
) -> Iterator[Piece]:
    """One text, the one that `generate` writes with this seed."""
    finish, offset, token_bytes = "length", 0, model.tokenizer.token_bytes
    if echoed:
        text, tokens = echoed
        offset = len(text)
        yield Piece(index, text, tokens=tokens)
    if not plan.max_tokens:
        yield Piece(index, "", finish=finish)
        return
    # A prompt's ids may end in the middle of a character.
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    decode(b"".join(map(token_bytes, ids[-LONGEST_CHARACTER:])))
    count = 0 if plan.body.alternatives is None else max(1, plan.body.alternatives)
    for drawn in model.tokens(ids, number=number, alternatives=count, **plan.sampling):
        tokens = []
        if drawn.probability is not None:
            top = [(token_bytes(id), _log(share)) for id, share in drawn.alternatives]
            tokens = [Token(token_bytes(drawn.id), _log(drawn.probability), top, offset)]
        finish = "stop" if drawn.ended else "length"
        yield Piece(index, drawn.text, drawn=1, tokens=tokens)
        offset += len(decode(token_bytes(drawn.id)))
    yield Piece(index, "", finish=finish)


async def _events(
    pieces: AsyncGenerator[Piece | None, None], answer: Answer, plan: _Plan, lengths: list[int]
) -> AsyncIterator[str]:
    drawn = 0
    with_usage = plan.body.stream_options.include_usage
    no_usage = {"usage": None} if with_usage else {}
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                if piece:
                    drawn += piece.drawn
                    if piece.text or piece.finish or piece.tokens:
                        tree = answer.tree([answer.part(piece)], streamed=True)
                        yield auth.as_event(tree | no_usage)
        except UserError as error:
            yield auth.late(error)
            return
    if with_usage:
        tree = answer.tree([], streamed=True) | {"usage": usage(sum(lengths), drawn)}
        yield auth.as_event(tree)
    yield "data: [DONE]\n\n"


def _log(share: float) -> float:
    return float(np.log(max(share, LEAST)))
