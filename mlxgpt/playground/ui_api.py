"""Web UI: its static files, and its API for generation, attention, logit lens and curves."""

from __future__ import annotations

import base64
import codecs
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from mlxgpt.config import Config, parse_sampling_params
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.html_report.page import replace_unprintable
from mlxgpt.html_report.run_metrics import load_run_metrics
from mlxgpt.inference.conversation import Conversation
from mlxgpt.inference.inspect import TopTokens
from mlxgpt.loaded_model import LoadedModel
from mlxgpt.model.stats import count_parameters
from mlxgpt.playground import auth
from mlxgpt.playground.auth import FiniteJSONResponse
from mlxgpt.playground.models import ModelCache
from mlxgpt.playground.request_body import (
    MAX_NEW_TOKENS,
    UIRequest,
    invalid_field_error,
    parse_request,
)
from mlxgpt.playground.scheduler import DeviceWorker
from mlxgpt.storage.run import Run
from mlxgpt.utils.errors import UserError

STATIC_DIR = Path(__file__).parent / "static"


def ui_routes(
    models: ModelCache, worker: DeviceWorker, lang: str | None = None
) -> list[Route | Mount]:
    """Routes of the web UI: the page, its static files and its API.

    Args:
        lang: language of the page, "en" or "pt"; default: the browser's.
    """
    endpoints = _UIEndpoints(models, worker)

    async def index(request: Request) -> Response:
        page = (STATIC_DIR / "index.html").read_text(encoding="utf-8")
        if lang:
            page = page.replace("<html ", f'<html data-lang="{lang}" ', 1)
        return Response(page, media_type="text/html")

    return [
        Route("/", index),
        Mount("/static", StaticFiles(directory=STATIC_DIR)),
        Route("/api/run", endpoints.run_info),
        Route("/api/curves", endpoints.training_curves),
        Route("/api/generate", endpoints.generate, methods=["POST"]),
        Route("/api/next_tokens", endpoints.next_tokens, methods=["POST"]),
        Route("/api/attention", endpoints.attention, methods=["POST"]),
        Route("/api/lens", endpoints.logit_lens, methods=["POST"]),
        Route("/api/neighbors", endpoints.find_neighbors, methods=["POST"]),
    ]


TOP_TOKEN_COUNT = 12  # most likely tokens per list
MAX_ATTENTION_TOKENS = 128  # longer texts are cut to their last tokens


class _UIEndpoints:
    def __init__(self, models: ModelCache, worker: DeviceWorker) -> None:
        self._models, self._worker = models, worker

    async def run_info(self, request: Request) -> Response:
        """Name, size and snapshots of the run, and an example prompt."""

        def compute() -> dict[str, Any]:
            run, reference = self._models.get_run(), self._models.find_reference()
            model_config, saved_steps = run.config.model, run.saved_steps()
            return {
                "name": replace_unprintable(run.name),
                "parameters": count_parameters(model_config),
                "n_layer": model_config.n_layer,
                "n_head": model_config.n_head,
                "block_size": model_config.block_size,
                "vocab_size": run.tokenizer.vocab_size,
                "max_tokens": MAX_NEW_TOKENS,
                "snapshots": saved_steps,
                "step": self._models.get_model().step if saved_steps else None,
                "example_prompt": _example_prompt(run.tokenizer),
                "imported": not run.data_name,
                "has_chat_template": run.has_chat_template,
                "reference": _describe_reference(reference) if reference else None,
            }

        return FiniteJSONResponse(await self._worker.call(compute))

    async def training_curves(self, request: Request) -> Response:
        """Loss curves and samples, read from the run's files."""
        curves = await run_in_threadpool(lambda: _training_curves(self._models.get_run()))
        return FiniteJSONResponse(curves)

    async def generate(self, request: Request) -> Response:
        """Stream generated tokens as server-sent events."""
        body = await parse_request(request, UIRequest)
        sampling_params = body.sampling_params() | {"max_tokens": body.max_tokens}
        seed = secrets.randbelow(1 << 31) if body.seed is None else body.seed
        parse_sampling_params(sampling_params)  # raises before the response starts

        def events() -> Iterator[dict[str, Any]]:
            model = self._get_model(body)
            ids = _encode_prompt(body, model)
            yield {
                "prompt": _label_prompt_tokens(model.tokenizer, ids),
                "seed": seed,
                "step": model.step,
            }
            finished = False
            for token in model.iter_tokens(
                ids, alternatives=TOP_TOKEN_COUNT, seed=seed, **sampling_params
            ):
                finished = token.ended
                yield {
                    "id": token.id,
                    "text": token.text,
                    "label": _token_label(model.tokenizer, token.id),
                    "probability": token.probability,
                    "alternatives": _label_top_tokens(model.tokenizer, token.alternatives),
                }
            yield {"finish_reason": "stop" if finished else "length"}

        first, rest = await self._worker.start_stream(events)
        return StreamingResponse(stream_sse_events(first, rest), media_type="text/event-stream")

    async def next_tokens(self, request: Request) -> Response:
        """Most likely next tokens, with probabilities before and after the sampling settings."""
        body = await parse_request(request, UIRequest)

        def compute() -> list[tuple[int, str, float, float]]:
            model = self._get_model(body)
            top_tokens, sampling_probs = model.next_token_probs(
                _encode_prompt(body, model), TOP_TOKEN_COUNT, **body.sampling_params()
            )
            labeled = _label_top_tokens(model.tokenizer, top_tokens)
            rows = zip(labeled, sampling_probs, strict=True)
            return [(*row, float(sampling_prob)) for row, sampling_prob in rows]

        return FiniteJSONResponse({"top_tokens": await self._worker.call(compute)})

    async def attention(self, request: Request) -> Response:
        """Attention weights of a layer, and the next tokens with and without the disabled heads.

        The weights [n_head, T, T] are uint8 (255 for 1.0), in base64.
        """
        body = await parse_request(request, UIRequest)

        def compute() -> dict[str, Any]:
            model, ids = self._load_model_and_ids(body)
            disabled_heads = _parse_disabled_heads(body, model)
            trace = self._models.get_trace(model, ids, disabled_heads)
            baseline = self._models.get_trace(model, ids, frozenset()) if disabled_heads else trace
            _check_upper_bound("layer", body.layer, len(trace.attention) - 1)
            weights = np.round(trace.attention[body.layer] * 255).astype(np.uint8)
            return {
                "tokens": _label_prompt_tokens(model.tokenizer, ids),
                "attention": base64.b64encode(weights.tobytes()).decode(),
                "baseline_next_tokens": _label_top_tokens(
                    model.tokenizer, baseline.next_tokens(TOP_TOKEN_COUNT)
                ),
                "next_tokens": _label_top_tokens(
                    model.tokenizer, trace.next_tokens(TOP_TOKEN_COUNT)
                ),
            }

        return FiniteJSONResponse(await self._worker.call(compute))

    async def logit_lens(self, request: Request) -> Response:
        """Logit lens: most likely next tokens from the residual stream after each layer."""
        body = await parse_request(request, UIRequest)

        def compute() -> list[list[tuple[int, str, float]]]:
            model, ids = self._load_model_and_ids(body)
            trace = self._models.get_trace(model, ids, _parse_disabled_heads(body, model))
            position = len(ids) - 1 if body.position is None else body.position
            _check_upper_bound("position", position, len(ids) - 1)
            layers = trace.logit_lens(position, 5)
            return [_label_top_tokens(model.tokenizer, top_tokens) for top_tokens in layers]

        return FiniteJSONResponse({"layers": await self._worker.call(compute)})

    async def find_neighbors(self, request: Request) -> Response:
        """Tokens with the most similar embeddings, by cosine similarity."""
        body = await parse_request(request, UIRequest)

        def compute() -> list[tuple[int, str, float]]:
            model = self._models.get_model(body.step)
            _check_upper_bound("token_id", body.token_id, model.tokenizer.vocab_size - 1)
            neighbors = model.find_neighbors(body.token_id, TOP_TOKEN_COUNT)
            return _label_top_tokens(model.tokenizer, neighbors)

        return FiniteJSONResponse({"neighbors": await self._worker.call(compute)})

    def _get_model(self, body: UIRequest) -> LoadedModel:
        """The model, or the one that its run was initialized from."""
        return self._models.get_reference() if body.reference else self._models.get_model(body.step)

    def _load_model_and_ids(self, body: UIRequest) -> tuple[LoadedModel, list[int]]:
        """The model and the prompt's last token ids, at most MAX_ATTENTION_TOKENS."""
        model = self._models.get_model(body.step)
        count = min(MAX_ATTENTION_TOKENS, model.run.config.model.block_size)
        return model, _encode_prompt(body, model)[-count:]


async def stream_sse_events(first: Any, rest: AsyncGenerator[Any, None]) -> AsyncIterator[str]:
    """Format a stream's items as server-sent events; a UserError becomes the last event."""
    async with aclosing(rest):
        try:
            yield auth.format_sse_event(first)
            async for item in rest:
                yield auth.format_sse_event(item)
        except UserError as error:
            yield auth.format_sse_error(error)


def _describe_reference(run: Run) -> dict[str, Any]:
    return {"name": replace_unprintable(run.name), "has_chat_template": run.has_chat_template}


def _encode_prompt(body: UIRequest, model: LoadedModel) -> list[int]:
    """Token ids of the prompt, given as ids, as text, or as the messages of a conversation."""
    if body.messages:
        conversation = Conversation(model.run.chat_template(), model.tokenizer)
        conversation.messages = [message.fields for message in body.messages]
        block_size = model.run.config.model.block_size
        ids, _ = conversation.encode(block_size - min(body.max_tokens, block_size // 2))
        return ids or model.encode("").tolist()
    return (model.check_ids(body.ids) if body.ids else model.encode(body.text)).tolist()


def _parse_disabled_heads(body: UIRequest, model: LoadedModel) -> frozenset[tuple[int, int]]:
    """(layer, head) of each disabled head; in requests, its index is layer * n_head + head."""
    n_layer, n_head = model.run.config.model.n_layer, model.run.config.model.n_head
    if any(index >= n_layer * n_head for index in body.disabled_heads):
        raise UserError(
            "no such attention head", f"the model has {n_layer * n_head} heads, numbered from 0."
        )
    return frozenset(divmod(index, n_head) for index in body.disabled_heads)


def _check_upper_bound(name: str, value: int, high: int) -> None:
    if value > high:
        raise invalid_field_error(name, value, f"an integer from 0 to {high:,}")


def _token_label(tokenizer: Tokenizer, id: int) -> str:
    """A token's text, or its bytes in hex if they are not valid UTF-8."""
    content = tokenizer.token_bytes(id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return f"<{content.hex(' ').upper()}>"


def _label_top_tokens(tokenizer: Tokenizer, top_tokens: TopTokens) -> list[tuple[int, str, float]]:
    return [(id, _token_label(tokenizer, id), prob) for id, prob in top_tokens]


def _label_prompt_tokens(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[int, str, str]]:
    """(id, text, label) of each token; a multi-token character is the text of its last token."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    labeled = []
    for id in ids:
        is_special = id == tokenizer.end_of_text
        text = "" if is_special else decode(tokenizer.token_bytes(id))
        labeled.append((id, text, _token_label(tokenizer, id)))
    return labeled


EXAMPLE_PROMPTS = ("ROMEO:", "The ", "Once upon a time")


def _example_prompt(tokenizer: Tokenizer) -> str:
    """An example prompt; for a character-level tokenizer, one that its vocabulary covers, or ""."""
    if not isinstance(tokenizer, CharTokenizer):
        return EXAMPLE_PROMPTS[-1]
    vocab = set(tokenizer.characters)
    return next((prompt for prompt in EXAMPLE_PROMPTS if vocab.issuperset(prompt)), "")


def _explain_first_loss(config: Config) -> dict[str, Any]:
    """The loss of a model before it learns, its label, and the reason for it."""
    if config.train.beta:
        return {
            "loss": math.log(2),
            "label": "the reference",
            "reason": "The reference prefers neither answer to itself; its DPO loss is ln 2.",
        }
    return {
        "loss": math.log(config.model.vocab_size),
        "label": "uniform guess",
        "reason": "An untrained model gives every token the same probability; its loss is "
        "ln(vocabulary size).",
    }


MAX_CURVE_POINTS = 600
MAX_SAMPLE_CHARS = 2_000


def _training_curves(run: Run) -> dict[str, Any]:
    metrics = load_run_metrics(run)
    loss_stride = max(1, len(metrics.steps) // MAX_CURVE_POINTS)

    def points(name: str, stride: int) -> list[tuple[float, float]]:
        values = metrics.values[name]
        finite_indices = np.flatnonzero(np.isfinite(values))
        return [
            (float(metrics.steps[index]), float(values[index]))
            for index in finite_indices[:: max(1, stride)]
        ]

    return {
        "loss": points("loss", loss_stride),
        "val_loss": points("val_loss", 1)[-MAX_CURVE_POINTS:],
        "step": float(metrics.steps[-1]) if len(metrics.steps) else 0.0,
        "max_steps": run.config.train.max_steps,
        "minutes": float(metrics.minutes[-1]) if len(metrics.minutes) else 0.0,
        "loss_unit": run.config.loss_unit,
        "start": _explain_first_loss(run.config),
        "samples": [
            (step, replace_unprintable(text)) for step, text in run.samples(MAX_SAMPLE_CHARS)
        ][-MAX_CURVE_POINTS:],
        "snapshots": run.saved_steps(),
    }
