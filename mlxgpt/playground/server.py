"""The server: its routes, its errors, its start and its end."""

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
from mlxgpt.playground.connection import MOST_CONNECTIONS, Connection
from mlxgpt.playground.models import Models
from mlxgpt.playground.scheduler import Busy, Device
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

HOST = "127.0.0.1"


def application(folder: Path, port: int, key: str) -> ASGIApp:
    """What answers: a run's page, and the API for other programs.

    Args:
        folder: the run's.
        port: that is listened on.
        key: that lets in.
    """
    models, device = Models(folder), Device()
    app = Starlette(
        routes=[*ui_api.routes(models, device), *completions.routes(models, device)],
        exception_handlers={UserError: _refused, HTTPException: _http, Busy: _busy, OSError: _os},
    )
    return auth.Access(app, port, key)


async def _refused(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, UserError)
    return auth.error(400, problem.problem, problem.remedy)


async def _http(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    return auth.error(problem.status_code, problem.detail)


async def _busy(request: Request, problem: Exception) -> Response:
    return auth.error(429, "too many texts are being written", "wait for one to end.")


async def _os(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, OSError)
    failed = files.os_error(problem, "read", Path("the run"))
    return auth.error(500, failed.problem, failed.remedy)


def bound(port: int) -> socket.socket:
    """A socket of this machine alone.

    Args:
        port: 0: any that is free.

    Raises:
        UserError: if it is taken, or not allowed.
    """
    # By its number asyncio knows TCP, and sends each piece at once: without, 40 ms later.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"port {port} cannot be used: {reason}", "name another: --port 8123."
        ) from error
    return listener


class Server(uvicorn.Server):
    """Answers until Ctrl-C: `run(sockets=[…])`.

    Args:
        ready: is called when there is an answer to be had.
    """

    def __init__(self, app: ASGIApp, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="critical",
                access_log=False,
                server_header=False,
                lifespan="off",
                http=Connection,
                ws="none",
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=1,
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self._ready()
