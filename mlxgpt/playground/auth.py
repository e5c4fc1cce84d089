"""Access control: API key, Host and Origin checks, security headers, body size limit.

The Origin check blocks requests from other sites, the Host check blocks DNS rebinding.
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

MAX_BODY_BYTES = 1 << 19  # 512 KiB

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
    """Middleware that checks requests before the application and adds security headers.

    Args:
        port: port that the server listens on.
        api_key: key required in the Authorization header, except for the page's static files.
    """

    def __init__(self, app: ASGIApp, port: int, api_key: str) -> None:
        self._app, self._api_key = app, api_key
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self._hosts |= {"127.0.0.1", "localhost"} if port == 80 else set()
        self._origins = {f"http://{host}" for host in self._hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or reject it."""
        if scope["type"] != "http":
            return  # only HTTP is served

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
            return error_response(403, "Host must be 127.0.0.1 or localhost")
        if not self._origins.issuperset(map(str.lower, origins)):
            return error_response(403, "requests from other origins are not allowed")
        content_length = headers.get("content-length", "0")
        if not (content_length.isascii() and content_length.isdecimal()):
            return error_response(400, "Content-Length is not a valid number")
        if len(content_length) > 18 or int(content_length) > MAX_BODY_BYTES:
            return error_response(413, f"the body exceeds {MAX_BODY_BYTES:,} bytes")
        if path == "/" or path.startswith("/static/"):
            return None
        scheme, _, api_key = headers.get("authorization", "").partition(" ")
        is_valid_key = secrets.compare_digest(api_key.strip(" ").encode(), self._api_key.encode())
        if scheme.lower() != "bearer" or not is_valid_key:
            return error_response(
                401, "the API key is missing or wrong: mlxgpt play prints it when it starts"
            )
        return None


class FiniteJSONResponse(JSONResponse):
    """JSON response; NaN and infinities, which JSON cannot represent, raise a UserError."""

    def render(self, content: Any) -> bytes:
        """Encode as UTF-8; unpaired surrogates, which file names may contain, are escaped."""
        return _dump_json(content, ensure_ascii=False).encode(errors="backslashreplace")


def _dump_json(value: Any, *, ensure_ascii: bool) -> str:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=ensure_ascii)
    except ValueError as error:
        raise UserError(
            "the model's output is not finite (NaN or infinity)",
            "its weights are damaged: restore them, or train again.",
        ) from error


def format_sse_event(value: Any) -> str:
    """Format a value as a server-sent event.

    Raises:
        UserError: if a number is not finite.
    """
    return f"data: {_dump_json(value, ensure_ascii=True)}\n\n"


def error_response(
    status: int, problem: str, remedy: str = "", error_type: str | None = None
) -> JSONResponse:
    """Create an error response in the format of OpenAI's API, also for the web UI."""
    error_type = error_type or ("invalid_request_error" if status < 500 else "server_error")
    message = _format_error_message(problem, remedy)
    error = {"message": message, "type": error_type, "param": None, "code": None}
    return FiniteJSONResponse({"error": error}, status)


def format_sse_error(error: UserError) -> str:
    """Format an error in a stream as a server-sent event."""
    message = _format_error_message(error.problem, error.remedy)
    return format_sse_event({"error": {"message": message}})


def _format_error_message(problem: str, remedy: str) -> str:
    return f"{problem}\n→ {remedy}" if remedy else problem


def _limit_body_size(receive: Receive) -> Receive:
    """Wrap `receive` to limit the size of chunked bodies, which have no Content-Length."""
    body_bytes = 0

    async def receive_limited() -> Message:
        nonlocal body_bytes
        message = await receive()
        body_bytes += len(message.get("body", b""))
        if body_bytes > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body exceeds {MAX_BODY_BYTES:,} bytes")
        return message

    return receive_limited
