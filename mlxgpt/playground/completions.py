"""OpenAI-compatible API: `/v1/models`, `/v1/completions`, `/v1/chat/completions`.

Reference: platform.openai.com/docs/api-reference. The only model is the run's.
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
from mlxgpt.data.chat_template import encode_chat
from mlxgpt.inference.generate import MAX_UTF8_BYTES
from mlxgpt.inference.scoring import ScoredToken
from mlxgpt.loaded_model import LoadedModel
from mlxgpt.playground import auth
from mlxgpt.playground.auth import FiniteJSONResponse
from mlxgpt.playground.models import ModelCache
from mlxgpt.playground.request_body import (
    MAX_CHOICES,
    MAX_PROMPT_CHARS,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    format_value,
    parse_request,
)
from mlxgpt.playground.responses import (
    ChatResponseBuilder,
    CompletionResponseBuilder,
    ResponseBuilder,
    TextDelta,
    TokenLogprob,
    build_usage,
)
from mlxgpt.playground.scheduler import DeviceWorker
from mlxgpt.playground.unsupported_fields import find_unknown_fields
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

Prompt = str | list[int]


@dataclass(frozen=True)
class _GenerationJob:
    """Validated request: prompts and generation settings."""

    body: GenerationRequest
    prompts: list[Prompt]
    max_tokens: int
    sampling_params: dict[str, Any]
    echo: bool


def openai_routes(models: ModelCache, worker: DeviceWorker) -> list[Route]:
    """Routes of the OpenAI-compatible API."""
    endpoints = _OpenAIEndpoints(models, worker)
    return [
        Route("/v1/models", endpoints.list_models),
        Route("/v1/models/{name:path}", endpoints.get_model),
        Route("/v1/completions", endpoints.create_completion, methods=["POST"]),
        Route("/v1/chat/completions", endpoints.create_chat_completion, methods=["POST"]),
    ]


MAX_WARNINGS = 100  # limit of logged field names


class _OpenAIEndpoints:
    def __init__(self, models: ModelCache, worker: DeviceWorker) -> None:
        self._models, self._worker = models, worker
        self._name = models.folder.name
        self._created = int(time.time())
        self._warned_fields: set[str] = set()

    def _model_info(self) -> dict[str, Any]:
        created = self._created
        return {"id": self._name, "object": "model", "created": created, "owned_by": "mlxgpt"}

    async def list_models(self, request: Request) -> Response:
        """List the models; there is only the run's."""
        return FiniteJSONResponse({"object": "list", "data": [self._model_info()]})

    async def get_model(self, request: Request) -> Response:
        """Describe the model with this name."""
        if request.path_params["name"] != self._name:
            return self._model_not_found()
        return FiniteJSONResponse(self._model_info())

    def _model_not_found(self) -> Response:
        return auth.error_response(404, "model not found", f"this server has {self._name!r} only.")

    async def create_completion(self, request: Request) -> Response:
        """Generate completions of prompts."""
        body = await parse_request(request, CompletionRequest)
        if body.model != self._name:
            return self._model_not_found()
        self._log_unknown_fields(find_unknown_fields(body))
        max_tokens = body.max_completion_tokens or body.max_tokens
        job = _create_job(body, body.prompt, max_tokens, body.echo)
        builder = CompletionResponseBuilder(self._name, body.num_top_logprobs)
        return await self._respond(job, builder)

    async def create_chat_completion(self, request: Request) -> Response:
        """Generate replies to a conversation, encoded with the run's chat template."""
        body = await parse_request(request, ChatCompletionRequest)
        if body.model != self._name:
            return self._model_not_found()
        self._log_unknown_fields(find_unknown_fields(body))
        template = self._models.get_run().chat_template()

        if sum(len(message.content) for message in body.messages) > MAX_PROMPT_CHARS:
            raise UserError(
                "the messages are too long", f"send at most {MAX_PROMPT_CHARS:,} characters."
            )
        messages = [message.fields for message in body.messages]

        def encode_messages() -> list[int]:
            model = self._models.get_model()
            ids = encode_chat(template, messages, model.tokenizer)
            return ids or model.encode("").tolist()

        prompt_ids = await self._worker.call(encode_messages)
        max_tokens = body.max_completion_tokens or body.max_tokens
        job = _create_job(body, [prompt_ids], max_tokens, echo=False)
        return await self._respond(job, ChatResponseBuilder(self._name, body.num_top_logprobs))

    def _log_unknown_fields(self, names: list[str]) -> None:
        """Log unknown fields, each name only once."""
        for name in names:
            if name not in self._warned_fields and len(self._warned_fields) < MAX_WARNINGS:
                self._warned_fields.add(name)
                logger.info("ignoring unknown request field %s", format_value(name))

    async def _respond(self, job: _GenerationJob, builder: ResponseBuilder) -> Response:
        prompt_lengths: list[int] = []

        def generate_deltas() -> Iterator[TextDelta | None]:
            model = self._models.get_model()
            encoded = [_encode_prompt(model, prompt) for prompt in job.prompts]
            prompt_lengths.extend(map(len, encoded))
            yield None  # all prompts are valid: the response can start
            index = 0
            for prompt, ids in zip(job.prompts, encoded, strict=True):
                echo = (yield from _echo_prompt(model, prompt, ids, job)) if job.echo else None
                for sample_index in range(job.body.n):
                    yield from _generate_choice(model, ids, sample_index, index, job, echo)
                    index += 1

        _, stream = await self._worker.start_stream(generate_deltas)
        if job.body.stream:
            events = _stream_sse_chunks(stream, builder, job, prompt_lengths)
            return StreamingResponse(events, media_type="text/event-stream")
        deltas_by_choice: dict[int, list[TextDelta]] = {}
        async with aclosing(stream):
            async for delta in stream:
                if delta:
                    deltas_by_choice.setdefault(delta.index, []).append(delta)
        choices = [builder.build_choice(n, deltas) for n, deltas in deltas_by_choice.items()]
        completion_tokens = sum(
            delta.num_tokens for deltas in deltas_by_choice.values() for delta in deltas
        )
        usage = build_usage(sum(prompt_lengths), completion_tokens)
        return FiniteJSONResponse(builder.build_response(choices) | {"usage": usage})


def _create_job(
    body: GenerationRequest, prompts: list[Prompt], max_tokens: int, echo: bool
) -> _GenerationJob:
    """Validate a request's generation settings."""
    if body.n * len(prompts) > MAX_CHOICES:
        raise UserError(
            f"{len(prompts)} prompts with n = {body.n} are {body.n * len(prompts)} completions",
            f"request at most {MAX_CHOICES} completions at once.",
        )
    sampling_params = {
        "temperature": 1.0,
        "max_tokens": max(1, max_tokens),
        "seed": secrets.randbelow(1 << 31) if body.seed is None else body.seed,
        "stop": tuple(body.stop),
    } | body.sampling_params()
    config.parse_sampling_params(sampling_params)
    return _GenerationJob(body, prompts, max_tokens, sampling_params, echo)


def _encode_prompt(model: LoadedModel, prompt: Prompt) -> list[int]:
    return (model.encode(prompt) if isinstance(prompt, str) else model.check_ids(prompt)).tolist()


def _echo_prompt(
    model: LoadedModel, prompt: Prompt, ids: list[int], job: _GenerationJob
) -> Generator[None, None, tuple[str, list[TokenLogprob]]]:
    """Return the prompt as it was sent, and its tokens with log-probabilities if requested.

    Omits a token that `encode` prepended to a text. Yields None to let other requests take turns.
    """
    num_top_logprobs, token_bytes = job.body.num_top_logprobs, model.tokenizer.token_bytes
    has_prefix = isinstance(prompt, str) and (
        not prompt or ids[0] in (model.run.bos, model.tokenizer.end_of_text)
    )
    scores: list[ScoredToken | None] = [None] * len(ids)
    if num_top_logprobs is not None:
        scores = [None]
        for chunk in model.score(ids, max(1, num_top_logprobs)):
            scores += chunk
            yield None
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    text, tokens = "", list[TokenLogprob]()
    for id, score in list(zip(ids, scores, strict=True))[int(has_prefix) :]:
        logprob, top_logprobs = None, list[tuple[bytes, float]]()
        if score and tokens:  # the first token has no log-probability
            logprob = score.logprob
            top_logprobs = [(token_bytes(top_id), value) for top_id, value in score.alternatives]
        content = token_bytes(id)
        tokens.append(TokenLogprob(content, logprob, top_logprobs, len(text)))
        text += decode(content)
    if not job.max_tokens:
        text += decode(b"", True)
    if isinstance(prompt, str) and prompt != text:
        offsets = map_char_offsets(text, prompt)
        tokens = [replace(token, offset=offsets[token.offset]) for token in tokens]
        text = prompt
    return text, tokens if num_top_logprobs is not None else []


def map_char_offsets(normalized: str, original: str) -> list[int]:
    """Map each character of a normalized text, and its end, to its offset in the original text.

    Normalization only removes characters, or replaces one with another.
    """
    offsets, position = [], 0
    for character in normalized:
        offsets.append(min(position, len(original)))
        is_removed = (
            original[position : position + 1] != character == original[position + 1 : position + 2]
        )
        position += 2 if is_removed else 1
    return [*offsets, len(original)]


def _generate_choice(
    model: LoadedModel,
    ids: list[int],
    sample_index: int,
    index: int,
    job: _GenerationJob,
    echo: tuple[str, list[TokenLogprob]] | None,
) -> Iterator[TextDelta]:
    """Generate one choice; the text is the same as `mlxgpt generate` with this seed."""
    finish_reason, offset, token_bytes = "length", 0, model.tokenizer.token_bytes
    if echo:
        text, tokens = echo
        offset = len(text)
        yield TextDelta(index, text, tokens=tokens)
    if not job.max_tokens:
        yield TextDelta(index, "", finish_reason=finish_reason)
        return
    # The prompt may end in the middle of a UTF-8 character.
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    decode(b"".join(map(token_bytes, ids[-MAX_UTF8_BYTES:])))
    num_top_logprobs = 0 if job.body.num_top_logprobs is None else max(1, job.body.num_top_logprobs)
    for output in model.iter_tokens(
        ids, sample_index=sample_index, alternatives=num_top_logprobs, **job.sampling_params
    ):
        tokens = []
        if output.probability is not None:
            logprob = _log_probability(output.probability)
            top_logprobs = [
                (token_bytes(id), _log_probability(prob)) for id, prob in output.alternatives
            ]
            tokens = [TokenLogprob(token_bytes(output.id), logprob, top_logprobs, offset)]
        finish_reason = "stop" if output.ended else "length"
        yield TextDelta(index, output.text, num_tokens=1, tokens=tokens)
        offset += len(decode(token_bytes(output.id)))
    yield TextDelta(index, "", finish_reason=finish_reason)


async def _stream_sse_chunks(
    deltas: AsyncGenerator[TextDelta | None, None],
    builder: ResponseBuilder,
    job: _GenerationJob,
    prompt_lengths: list[int],
) -> AsyncIterator[str]:
    completion_tokens = 0
    include_usage = job.body.stream_options.include_usage
    no_usage = {"usage": None} if include_usage else {}
    async with aclosing(deltas):
        try:
            async for delta in deltas:
                if delta:
                    completion_tokens += delta.num_tokens
                    if delta.text or delta.finish_reason or delta.tokens:
                        choices = [builder.build_delta_choice(delta)]
                        chunk = builder.build_response(choices, streamed=True)
                        yield auth.format_sse_event(chunk | no_usage)
        except UserError as error:
            yield auth.format_sse_error(error)
            return
    if include_usage:
        usage = build_usage(sum(prompt_lengths), completion_tokens)
        yield auth.format_sse_event(builder.build_response([], streamed=True) | {"usage": usage})
    yield "data: [DONE]\n\n"


MIN_PROBABILITY = 1e-30  # avoids log(0)


def _log_probability(probability: float) -> float:
    return float(np.log(max(probability, MIN_PROBABILITY)))
