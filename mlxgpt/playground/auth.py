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

MAX_BODY_BYTES = 1 << 19  # bytes
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class AuthMiddleware:
    """Around an application.

    Args:
        port: that it listens on.
        api_key: required in each request's Authorization header, except for the page itself.
    """

    def __init__(self, app: ASGIApp, port: int, api_key: str) -> None:
        self._app, self._api_key = app, api_key
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self._hosts |= {"127.0.0.1", "localhost"} if port == 80 else set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return  # nothing else is served

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        if rejection := self._check_request(scope["path"], Headers(scope=scope)):
            await rejection(scope, receive, send_with_headers)
        else:
            await self._app(scope, _limit_body_size(receive), send_with_headers)

    def _check_request(self, path: str, headers: Headers) -> JSONResponse | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return error_response(403, "this server answers to 127.0.0.1 and localhost alone")
        if any(
            origin.lower() not in {f"http://{host}" for host in self._hosts} for origin in origins
        ):
            return error_response(403, "pages from elsewhere are not answered")
        content_length = headers.get("content-length", "0")
        if not (content_length.isascii() and content_length.isdecimal()):
            return error_response(400, "Content-Length is no number")
        if len(content_length) > 18 or int(content_length) > MAX_BODY_BYTES:
            return error_response(413, f"more than {MAX_BODY_BYTES:,} bytes are not read")
        if path == "/" or path.startswith("/static/"):
            return None
        scheme, _, api_key = headers.get("authorization", "").partition(" ")
        is_valid_key = secrets.compare_digest(api_key.strip(" ").encode(), self._api_key.encode())
        if scheme.lower() != "bearer" or not is_valid_key:
            return error_response(
                401, "the key is missing or another one: it stands where play was started"
            )
        return None


class FiniteJSONResponse(JSONResponse):
    """JSON without NaN or infinities, which it does not have."""

    def render(self, content: Any) -> bytes:
        """The body in UTF-8; half a surrogate pair, as in a file's name, is escaped."""
        return _dump_json(content, ensure_ascii=False).encode(errors="backslashreplace")


def _dump_json(tree: Any, *, ensure_ascii: bool) -> str:
    try:
        return json.dumps(tree, allow_nan=False, ensure_ascii=ensure_ascii)
    except ValueError as error:
        raise UserError(
            "the model gives numbers that are not finite",
            "its weights are damaged: restore them, or train again.",
        ) from error


def format_sse_event(tree: Any) -> str:
    """A server-sent event.

    Raises:
        UserError: if a number is not finite.
    """
    return f"data: {_dump_json(tree, ensure_ascii=True)}\n\n"


def error_response(
    status: int, problem: str, remedy: str = "", error_type: str | None = None
) -> JSONResponse:
    """An error as OpenAI's API has it, for every route."""
    error_type = error_type or ("invalid_request_error" if status < 500 else "server_error")
    tree = {
        "message": _format_error_message(problem, remedy),
        "type": error_type,
        "param": None,
        "code": None,
    }
    return FiniteJSONResponse({"error": tree}, status)


def format_sse_error(error: UserError) -> str:
    """An error where an answer had begun, as a server-sent event."""
    tree = {"message": _format_error_message(error.problem, error.remedy)}
    return format_sse_event({"error": tree})


def _format_error_message(problem: str, remedy: str) -> str:
    return f"{problem}\n→ {remedy}" if remedy else problem


def _limit_body_size(receive: Receive) -> Receive:
    """A body that did not say how long it is."""
    body_bytes = 0

    async def receive_limited() -> Message:
        nonlocal body_bytes
        message = await receive()
        body_bytes += len(message.get("body", b""))
        if body_bytes > MAX_BODY_BYTES:
            raise HTTPException(413, f"more than {MAX_BODY_BYTES:,} bytes are not read")
        return message

    return receive_limited
