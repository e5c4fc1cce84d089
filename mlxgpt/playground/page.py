"""What the page asks for: to write, to look inside, how the training went."""

from __future__ import annotations

import base64
import codecs
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from mlxgpt.config import sampling
from mlxgpt.corpus.tokenizer import CharTokenizer, Tokenizer
from mlxgpt.errors import UserError
from mlxgpt.inference.looking import Likely
from mlxgpt.loaded import Model
from mlxgpt.model.counting import count_parameters
from mlxgpt.pages.course import course_of
from mlxgpt.pages.page import shown
from mlxgpt.playground import access
from mlxgpt.playground.asked import MOST_TOKENS, Asked
from mlxgpt.playground.models import Models
from mlxgpt.playground.sharing import Device
from mlxgpt.storage.run import Run

STATIC = Path(__file__).parent / "static"
ALTERNATIVES = 12  # likely tokens, wherever some are shown
MOST_SEEN = 128  # tokens whose attention is shown, the last ones
MOST_POINTS = 600  # of a curve
LONGEST_SAMPLE = 2_000  # characters
SETTINGS = ("temperature", "top_p", "min_p", "repetition_penalty")
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

        return JSONResponse(await self._device.call(told))

    async def course(self, request: Request) -> Response:
        """How the training goes, from the run's files; the trainer is asked nothing."""
        return JSONResponse(await run_in_threadpool(lambda: _course(self._models.opened())))

    async def write(self, request: Request) -> Response:
        """A text, token by token, as events."""
        asked = await Asked.of(request)
        given = _sampling(asked)
        given |= {"max_tokens": asked.whole("max_tokens", 1, MOST_TOKENS, 200)}
        seed = asked.whole("seed", 0, 2**53 - 1, secrets.randbelow(1 << 31))
        sampling(given)  # refused before anything is sent
        step = _step(asked)

        def events() -> Iterator[dict[str, Any]]:
            model = self._models.at(step)
            ids = _ids(asked, model)
            yield {"prompt": _pieces(model.tokenizer, ids), "seed": seed, "step": model.step}
            ended = False
            for drawn in model.tokens(ids, alternatives=ALTERNATIVES, seed=seed, **given):
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
        asked = await Asked.of(request)
        given = _sampling(asked)

        def told() -> list[tuple[int, str, float, float]]:
            model = self._models.at(_step(asked))
            likely, left = model.next(_ids(asked, model), ALTERNATIVES, **given)
            named = _named(model.tokenizer, likely)
            return [(*one, float(share)) for one, share in zip(named, left, strict=True)]

        return JSONResponse({"likely": await self._device.call(told)})

    async def look(self, request: Request) -> Response:
        """The attention of a layer's heads, and the next token with and without some of all."""
        asked = await Asked.of(request)

        def told() -> dict[str, Any]:
            model, ids = self._seen(asked)
            off = _heads(asked, model)
            look = self._models.look(model, ids, off)
            usual = self._models.look(model, ids, frozenset()) if off else look
            layer = asked.whole("layer", 0, len(look.attention) - 1, 0)
            weights = np.round(look.attention[layer] * 255).astype(np.uint8)
            return {
                "tokens": _pieces(model.tokenizer, ids),
                "attention": base64.b64encode(weights.tobytes()).decode(),
                "usual": _named(model.tokenizer, usual.next(ALTERNATIVES)),
                "without": _named(model.tokenizer, look.next(ALTERNATIVES)),
            }

        return JSONResponse(await self._device.call(told))

    async def lens(self, request: Request) -> Response:
        """What each layer would have said after a token."""
        asked = await Asked.of(request)

        def told() -> list[list[tuple[int, str, float]]]:
            model, ids = self._seen(asked)
            look = self._models.look(model, ids, _heads(asked, model))
            position = asked.whole("position", 0, len(ids) - 1, len(ids) - 1)
            return [_named(model.tokenizer, likely) for likely in look.lens(position, 5)]

        return JSONResponse({"layers": await self._device.call(told)})

    async def neighbours(self, request: Request) -> Response:
        """The tokens whose embeddings are most like one's."""
        asked = await Asked.of(request)

        def told() -> list[tuple[int, str, float]]:
            model = self._models.at(_step(asked))
            id = asked.whole("id", 0, model.tokenizer.vocab_size - 1)
            return _named(model.tokenizer, model.neighbours(id, ALTERNATIVES))

        return JSONResponse({"likely": await self._device.call(told)})

    def _seen(self, asked: Asked) -> tuple[Model, list[int]]:
        """The model, and the last ids that are looked at."""
        model = self._models.at(_step(asked))
        return model, _ids(asked, model)[-min(MOST_SEEN, model.run.config.model.block_size) :]


async def as_events(first: Any, rest: AsyncGenerator[Any, None]) -> AsyncIterator[str]:
    """Server-sent events; an error on the way is the last one."""
    async with aclosing(rest):
        yield f"data: {json.dumps(first)}\n\n"
        try:
            async for item in rest:
                yield f"data: {json.dumps(item)}\n\n"
        except UserError as error:
            yield access.late(error)


def _step(asked: Asked) -> int | None:
    return None if asked.tree.get("step") is None else asked.whole("step", 0, 10**18)


def _ids(asked: Asked, model: Model) -> list[int]:
    """What is to be continued: ids as they are, or a text."""
    if asked.tree.get("ids"):
        return model.checked(asked.whole_numbers("ids")).tolist()
    return model.ids(asked.text("text", "")).tolist()


def _sampling(asked: Asked) -> dict[str, Any]:
    numbers = {name: asked.number(name) for name in SETTINGS}
    given: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    return given | {"top_k": asked.whole("top_k", 0, 1 << 31, 0)}


def _heads(asked: Asked, model: Model) -> frozenset[tuple[int, int]]:
    """The heads that are switched off, numbered layer by layer."""
    m = model.run.config.model
    numbers = asked.whole_numbers("off", m.n_layer * m.n_head) if "off" in asked.tree else []
    if any(number >= m.n_layer * m.n_head for number in numbers):
        raise UserError("there is no such head", f"the model has {m.n_layer * m.n_head}.")
    return frozenset(divmod(number, m.n_head) for number in numbers)


def _name(tokenizer: Tokenizer, id: int) -> str:
    """A token by itself: its text, or its bytes where they are only part of a character."""
    content = tokenizer.token_bytes(id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return f"<{content.hex(' ').upper()}>"


def _named(tokenizer: Tokenizer, likely: Likely) -> list[tuple[int, str, float]]:
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
