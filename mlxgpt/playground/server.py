"""HTTP server of `mlxgpt play`: routes, error responses, socket, startup."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from mlxgpt.playground import auth, completions, ui_api
from mlxgpt.playground.connection import MAX_CONNECTIONS, TimeoutH11Protocol
from mlxgpt.playground.models import ModelCache
from mlxgpt.playground.scheduler import DeviceWorker, TooManyRequestsError
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError


def create_app(folder: Path, port: int, api_key: str, lang: str | None = None) -> ASGIApp:
    """Create the ASGI application: the web UI and the OpenAI-compatible API of a run.

    Args:
        folder: folder of the run.
        port: port that the server listens on.
        api_key: key that API requests must send.
        lang: language of the web UI, "en" or "pt"; default: the browser's.
    """
    models, worker = ModelCache(folder), DeviceWorker()
    app = Starlette(
        routes=[
            *ui_api.ui_routes(models, worker, lang),
            *completions.openai_routes(models, worker),
        ],
        exception_handlers={
            UserError: _handle_user_error,
            HTTPException: _handle_http_exception,
            TooManyRequestsError: _handle_too_many_requests,
            OSError: _handle_os_error,
        },
    )
    return auth.AuthMiddleware(app, port, api_key)


async def _handle_user_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, UserError)
    return auth.error_response(400, exc.problem, exc.remedy)


async def _handle_http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return auth.error_response(exc.status_code, exc.detail)


async def _handle_too_many_requests(request: Request, exc: Exception) -> Response:
    return auth.error_response(429, "too many concurrent requests", "wait for one to finish.")


async def _handle_os_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, OSError)
    user_error = files.to_user_error(exc, "read", Path("the run"))
    return auth.error_response(500, user_error.problem, user_error.remedy)


HOST = "127.0.0.1"


def bind_socket(port: int) -> socket.socket:
    """Bind a socket on localhost.

    Args:
        port: port number; 0: any free port.

    Raises:
        UserError: if the port is taken or not allowed.
    """
    # asyncio sets TCP_NODELAY only with this protocol number; otherwise chunks arrive 40 ms late.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen on port {port}: {reason}", "choose another port: --port 8123."
        ) from error
    return listener


class Server(uvicorn.Server):
    """Uvicorn server; `run(sockets=[…])` serves until Ctrl-C.

    Args:
        on_ready: called once the server is listening.
    """

    def __init__(self, app: ASGIApp, on_ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="critical",
                access_log=False,
                server_header=False,
                lifespan="off",
                http=TimeoutH11Protocol,
                ws="none",
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=1,
            )
        )
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, then call `on_ready`."""
        await super().startup(sockets)
        self._on_ready()
