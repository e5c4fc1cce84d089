"""Who gets in: programs on this machine that know the key, and the page that was opened with it.

A page from elsewhere is refused by its Origin, a name that was pointed at this machine by its Host,
and everybody by a body that is too long.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxgpt.utils.errors import UserError

LARGEST_BODY = 1 << 19  # bytes
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Access:
    """Around an application.

    Args:
        port: that it listens on.
        key: to be in each request's Authorization, but for the page itself, which tells nothing.
    """

    def __init__(self, app: ASGIApp, port: int, key: str) -> None:
        self._app, self._key = app, key
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self._hosts |= {"127.0.0.1", "localhost"} if port == 80 else set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return  # nothing else is served

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if refusal := self._refusal(scope["path"], Headers(scope=scope)):
            await refusal(scope, receive, with_headers)
        else:
            await self._app(scope, _bounded(receive), with_headers)

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return error(403, "this server answers to 127.0.0.1 and localhost alone")
        if any(
            origin.lower() not in {f"http://{host}" for host in self._hosts} for origin in origins
        ):
            return error(403, "pages from elsewhere are not answered")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()):
            return error(400, "Content-Length is no number")
        if len(length) > 18 or int(length) > LARGEST_BODY:
            return error(413, f"more than {LARGEST_BODY:,} bytes are not read")
        if path == "/" or path.startswith("/static/"):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        is_known = secrets.compare_digest(key.strip(" ").encode(), self._key.encode())
        if scheme.lower() != "bearer" or not is_known:
            return error(401, "the key is missing or another one: it stands where play was started")
        return None


class FiniteJSONResponse(JSONResponse):
    """JSON without NaN or infinities, which it does not have."""

    def render(self, content: Any) -> bytes:
        """The body in UTF-8; half a surrogate pair, as in a file's name, is escaped."""
        return _as_json(content, ensure_ascii=False).encode(errors="backslashreplace")


def _as_json(tree: Any, *, ensure_ascii: bool) -> str:
    try:
        return json.dumps(tree, allow_nan=False, ensure_ascii=ensure_ascii)
    except ValueError as error:
        raise UserError(
            "the model gives numbers that are not finite",
            "its weights are damaged: restore them, or train again.",
        ) from error


def as_event(tree: Any) -> str:
    """A server-sent event.

    Raises:
        UserError: if a number is not finite.
    """
    return f"data: {_as_json(tree, ensure_ascii=True)}\n\n"


def error(status: int, problem: str, remedy: str = "", kind: str | None = None) -> JSONResponse:
    """An error as OpenAI's API has it, for every route."""
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    tree = {"message": _message(problem, remedy), "type": kind, "param": None, "code": None}
    return FiniteJSONResponse({"error": tree}, status)


def late(error: UserError) -> str:
    """An error where an answer had begun, as a server-sent event."""
    tree = {"message": _message(error.problem, error.remedy)}
    return as_event({"error": tree})


def _message(problem: str, remedy: str) -> str:
    return f"{problem}\n→ {remedy}" if remedy else problem


def _bounded(receive: Receive) -> Receive:
    """A body that did not say how long it is."""
    length = 0

    async def counted() -> Message:
        nonlocal length
        message = await receive()
        length += len(message.get("body", b""))
        if length > LARGEST_BODY:
            raise HTTPException(413, f"more than {LARGEST_BODY:,} bytes are not read")
        return message

    return counted
