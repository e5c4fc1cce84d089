"""What the page asks for: to write, to look inside, how the training went."""

from __future__ import annotations

import base64
import codecs
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

from mlxgpt.config import sampling
from mlxgpt.data.tokenizers.char import CharTokenizer, Tokenizer
from mlxgpt.html_report.page import shown
from mlxgpt.html_report.run_metrics import course_of
from mlxgpt.inference.inspect import TopTokens
from mlxgpt.loaded_model import LoadedModel
from mlxgpt.model.stats import count_parameters
from mlxgpt.playground import auth
from mlxgpt.playground.auth import FiniteJSONResponse
from mlxgpt.playground.models import Models
from mlxgpt.playground.request_body import MOST_TOKENS, PageBody, invalid, parse
from mlxgpt.playground.scheduler import Device
from mlxgpt.storage.run import Run
from mlxgpt.utils.errors import UserError

STATIC = Path(__file__).parent / "static"
ALTERNATIVES = 12  # likely tokens, wherever some are shown
MOST_SEEN = 128  # tokens whose attention is shown, the last ones
MOST_POINTS = 600  # of a curve
LONGEST_SAMPLE = 2_000  # characters
OPENINGS = ("ROMEO:", "The ", "Once upon a time")


def routes(models: Models, device: Device) -> list[Route | Mount]:
    """The page's, with its own files."""
    page = _Page(models, device)

    async def index(request: Request) -> Response:
        return Response((STATIC / "index.html").read_bytes(), media_type="text/html")

    return [
        Route("/", index),
        Mount("/static", StaticFiles(directory=STATIC)),
        Route("/api/run", page.run),
        Route("/api/course", page.course),
        Route("/api/write", page.write, methods=["POST"]),
        Route("/api/next", page.next, methods=["POST"]),
        Route("/api/look", page.look, methods=["POST"]),
        Route("/api/lens", page.lens, methods=["POST"]),
        Route("/api/neighbours", page.neighbours, methods=["POST"]),
    ]


class _Page:
    def __init__(self, models: Models, device: Device) -> None:
        self._models, self._device = models, device

    async def run(self, request: Request) -> Response:
        """What there is to play with."""

        def told() -> dict[str, Any]:
            run = self._models.opened()
            m, ages = run.config.model, run.ages()
            return {
                "name": shown(run.name),
                "parameters": count_parameters(m),
                "n_layer": m.n_layer,
                "n_head": m.n_head,
                "block_size": m.block_size,
                "vocab_size": run.tokenizer.vocab_size,
                "max_tokens": MOST_TOKENS,
                "ages": ages,
                "step": self._models.at().step if ages else None,
                "opening": _opening(run.tokenizer),
                "trained": bool(run.data_name),
            }

        return FiniteJSONResponse(await self._device.call(told))

    async def course(self, request: Request) -> Response:
        """How the training goes, from the run's files; the trainer is asked nothing."""
        return FiniteJSONResponse(await run_in_threadpool(lambda: _course(self._models.opened())))

    async def write(self, request: Request) -> Response:
        """A text, token by token, as events."""
        body = await parse(request, PageBody)
        settings = body.settings() | {"max_tokens": body.max_tokens}
        seed = secrets.randbelow(1 << 31) if body.seed is None else body.seed
        sampling(settings)  # refused before anything is sent

        def events() -> Iterator[dict[str, Any]]:
            model = self._models.at(body.step)
            ids = _ids(body, model)
            yield {"prompt": _pieces(model.tokenizer, ids), "seed": seed, "step": model.step}
            ended = False
            for drawn in model.tokens(ids, alternatives=ALTERNATIVES, seed=seed, **settings):
                ended = drawn.ended
                yield {
                    "id": drawn.id,
                    "text": drawn.text,
                    "name": _name(model.tokenizer, drawn.id),
                    "probability": drawn.probability,
                    "alternatives": _named(model.tokenizer, drawn.alternatives),
                }
            yield {"end": "stop" if ended else "length"}

        first, rest = await self._device.begun(events)
        return StreamingResponse(as_events(first, rest), media_type="text/event-stream")

    async def next(self, request: Request) -> Response:
        """What may come next, and what settings leave of it."""
        body = await parse(request, PageBody)

        def told() -> list[tuple[int, str, float, float]]:
            model = self._models.at(body.step)
            likely, left = model.next(_ids(body, model), ALTERNATIVES, **body.settings())
            named = _named(model.tokenizer, likely)
            return [(*one, float(share)) for one, share in zip(named, left, strict=True)]

        return FiniteJSONResponse({"likely": await self._device.call(told)})

    async def look(self, request: Request) -> Response:
        """The attention of a layer's heads, and the next token with and without some of all."""
        body = await parse(request, PageBody)

        def told() -> dict[str, Any]:
            model, ids = self._seen(body)
            off = _heads(body, model)
            look = self._models.look(model, ids, off)
            usual = self._models.look(model, ids, frozenset()) if off else look
            _check("layer", body.layer, len(look.attention) - 1)
            weights = np.round(look.attention[body.layer] * 255).astype(np.uint8)
            return {
                "tokens": _pieces(model.tokenizer, ids),
                "attention": base64.b64encode(weights.tobytes()).decode(),
                "usual": _named(model.tokenizer, usual.next(ALTERNATIVES)),
                "without": _named(model.tokenizer, look.next(ALTERNATIVES)),
            }

        return FiniteJSONResponse(await self._device.call(told))

    async def lens(self, request: Request) -> Response:
        """What each layer would have said after a token."""
        body = await parse(request, PageBody)

        def told() -> list[list[tuple[int, str, float]]]:
            model, ids = self._seen(body)
            look = self._models.look(model, ids, _heads(body, model))
            position = len(ids) - 1 if body.position is None else body.position
            _check("position", position, len(ids) - 1)
            return [_named(model.tokenizer, likely) for likely in look.lens(position, 5)]

        return FiniteJSONResponse({"layers": await self._device.call(told)})

    async def neighbours(self, request: Request) -> Response:
        """The tokens whose embeddings are most like one's."""
        body = await parse(request, PageBody)

        def told() -> list[tuple[int, str, float]]:
            model = self._models.at(body.step)
            _check("id", body.id, model.tokenizer.vocab_size - 1)
            return _named(model.tokenizer, model.neighbours(body.id, ALTERNATIVES))

        return FiniteJSONResponse({"likely": await self._device.call(told)})

    def _seen(self, body: PageBody) -> tuple[LoadedModel, list[int]]:
        """The model, and the last ids that are looked at."""
        model = self._models.at(body.step)
        return model, _ids(body, model)[-min(MOST_SEEN, model.run.config.model.block_size) :]


async def as_events(first: Any, rest: AsyncGenerator[Any, None]) -> AsyncIterator[str]:
    """Server-sent events; an error on the way is the last one."""
    async with aclosing(rest):
        try:
            yield auth.as_event(first)
            async for item in rest:
                yield auth.as_event(item)
        except UserError as error:
            yield auth.late(error)


def _ids(body: PageBody, model: LoadedModel) -> list[int]:
    """What is to be continued: ids as they are, or a text."""
    return (model.checked(body.ids) if body.ids else model.ids(body.text)).tolist()


def _heads(body: PageBody, model: LoadedModel) -> frozenset[tuple[int, int]]:
    """The heads that are switched off, numbered layer by layer."""
    m = model.run.config.model
    if any(number >= m.n_layer * m.n_head for number in body.off):
        raise UserError("there is no such head", f"the model has {m.n_layer * m.n_head}.")
    return frozenset(divmod(number, m.n_head) for number in body.off)


def _check(name: str, value: int, high: int) -> None:
    if value > high:
        raise invalid(name, value, f"a whole number from 0 to {high:,}")


def _name(tokenizer: Tokenizer, id: int) -> str:
    """A token by itself: its text, or its bytes where they are only part of a character."""
    content = tokenizer.token_bytes(id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return f"<{content.hex(' ').upper()}>"


def _named(tokenizer: Tokenizer, likely: TopTokens) -> list[tuple[int, str, float]]:
    return [(id, _name(tokenizer, id), share) for id, share in likely]


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[int, str, str]]:
    """Each id with what of the text is certain by it, and its name."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    pieces = []
    for id in ids:
        special = id == tokenizer.end_of_text
        text = "" if special else decode(tokenizer.token_bytes(id))
        pieces.append((id, text, _name(tokenizer, id)))
    return pieces


def _opening(tokenizer: Tokenizer) -> str:
    """How a text may begin: a story; of characters the first one whose characters are all known."""
    if not isinstance(tokenizer, CharTokenizer):
        return OPENINGS[-1]
    known = set(tokenizer.characters)
    return next((opening for opening in OPENINGS if known.issuperset(opening)), "")


def _course(run: Run) -> dict[str, Any]:
    course = course_of(run)
    every = max(1, len(course.steps) // MOST_POINTS)

    def points(name: str, thin: int) -> list[tuple[float, float]]:
        values = course.values[name]
        known = np.flatnonzero(np.isfinite(values))
        return [(float(course.steps[n]), float(values[n])) for n in known[:: max(1, thin)]]

    return {
        "loss": points("loss", every),
        "val_loss": points("val_loss", 1)[-MOST_POINTS:],
        "step": float(course.steps[-1]) if len(course.steps) else 0.0,
        "max_steps": run.config.train.max_steps,
        "minutes": float(course.minutes[-1]) if len(course.minutes) else 0.0,
        "vocab_size": run.config.model.vocab_size,
        "samples": [(step, shown(text)) for step, text in run.samples(LONGEST_SAMPLE)][
            -MOST_POINTS:
        ],
        "ages": run.ages(),
    }
