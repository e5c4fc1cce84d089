"""A playground server on a real socket, and a client for it."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from mlxgpt.playground import server

KEY = "a-key-of-the-tests"


@dataclass(frozen=True)
class PlayServer:
    """A running server, with methods to send requests."""

    port: int
    folder: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **headers: str) -> httpx.Client:
        all_headers = {"Authorization": f"Bearer {KEY}"} | headers
        return httpx.Client(base_url=self.address, headers=all_headers, timeout=60, trust_env=False)

    def get(self, path: str, **headers: str) -> httpx.Response:
        with self.client(**headers) as client:
            return client.get(path)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        with self.client(**headers) as client:
            return client.post(path, json=body)

    def post_ok(self, path: str, **body: Any) -> Any:
        """Return the JSON response of a request that must succeed."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    def post_error(self, path: str, **body: Any) -> str:
        """Return the error message of a request that must be refused."""
        response = self.post(path, body)
        assert 400 <= response.status_code < 500, response.text
        return str(response.json()["error"]["message"])

    def post_stream(self, path: str, **body: Any) -> list[Any]:
        """Return all events of a streamed response except the final [DONE]."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        parts = response.text.split("\n\n")
        assert parts.pop() == ""
        return [
            json.loads(event.removeprefix("data: ")) for event in parts if event != "data: [DONE]"
        ]


@contextlib.contextmanager
def serve_run(folder: Path, lang: str | None = None) -> Iterator[PlayServer]:
    """Serve a run within this context."""
    listener = server.bind_socket(0)
    port = listener.getsockname()[1]
    ready = threading.Event()
    app_server = server.Server(server.create_app(folder, port, KEY, lang), ready.set)
    thread = threading.Thread(target=app_server.run, kwargs={"sockets": [listener]})
    thread.start()
    assert ready.wait(30)
    try:
        yield PlayServer(port, folder)
    finally:
        app_server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def serve_run_copy(trained: Path, folder: Path) -> Iterator[PlayServer]:
    """Copy the finished run to this folder and serve it."""
    shutil.copytree(trained / "runs" / "done", folder)
    with serve_run(folder) as play_server:
        yield play_server
