"""Slow clients, which send or read nothing or too slowly, do not block other clients."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlxgpt.playground import connection, scheduler, server
from tests.helpers.play_server import KEY, PlayServer, serve_run_copy

BODY = {"model": "mine", "prompt": "to", "max_tokens": 2}


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CLIENT_TIMEOUT", 0.5)


@pytest.fixture
def play_server(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PlayServer]:
    """Server with a send buffer too small for its responses."""
    original_bind = server.bind_socket

    def bind_small_buffer(port: int) -> socket.socket:
        listener = original_bind(port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(server, "bind_socket", bind_small_buffer)
    with serve_run_copy(trained, tmp_path / "mine") as served:
        yield served


@contextlib.contextmanager
def connect(play_server: PlayServer, *lines: str, body: bytes = b"") -> Iterator[socket.socket]:
    """Connect a client that sends these lines; only the test reads from it."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(60)
        client.connect(("127.0.0.1", play_server.port))
        client.sendall("".join(f"{line}\r\n" for line in lines).encode() + body)
        yield client


def request_lines(play_server: PlayServer, request: str, length: int = 0) -> list[str]:
    return [
        f"{request} HTTP/1.1",
        f"Host: 127.0.0.1:{play_server.port}",
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/json",
        *([f"Content-Length: {length}"] if length else []),
        "",
    ]


@contextlib.contextmanager
def unread_stream(play_server: PlayServer) -> Iterator[socket.socket]:
    body = json.dumps(BODY | {"max_tokens": 4000, "stream": True, "logprobs": 5}).encode()
    with connect(
        play_server, *request_lines(play_server, "POST /v1/completions", len(body)), body=body
    ) as client:
        yield client


def is_closed(client: socket.socket) -> bool:
    """Read until the server closes the connection; return True, or time out after 60 s."""
    with contextlib.suppress(ConnectionResetError):
        while client.recv(1 << 16):
            pass
    return True


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not (satisfied := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return satisfied


def test_unread_streams_do_not_count_as_waiting(
    play_server: PlayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_WAITING", 2)
    with unread_stream(play_server), unread_stream(play_server), unread_stream(play_server):
        assert wait_until(lambda: play_server.post("/v1/completions", BODY).status_code == 200)
        # Unread streams take no more turns.
        answers = [play_server.post("/v1/completions", BODY).status_code for _ in range(10)]
        assert answers == [200] * 10


@pytest.mark.usefixtures("short_timeout")
def test_unread_stream_is_closed(play_server: PlayServer) -> None:
    with unread_stream(play_server) as client:
        time.sleep(3)
        assert is_closed(client), "before all 4,000 tokens"
    assert play_server.post("/v1/completions", BODY).status_code == 200


def test_slow_reader_gets_the_whole_response(
    play_server: PlayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading takes longer than the timeout of a client that reads nothing."""
    monkeypatch.setattr(connection, "CLIENT_TIMEOUT", 2.0)
    path = "/static/d3-7.9.0.min.js"
    expected = play_server.get(path).content
    with connect(play_server, *request_lines(play_server, f"GET {path}")) as client:
        content = b""
        while not content.endswith(expected):
            time.sleep(0.02)
            piece = client.recv(2048)
            assert piece, f"{len(content)} of {len(expected)} bytes"
            content += piece


@pytest.mark.usefixtures("short_timeout")
@pytest.mark.parametrize("sent", ["nothing", "half a head", "half a body", "one request"])
def test_incomplete_request_is_closed(play_server: PlayServer, sent: str) -> None:
    lines = request_lines(play_server, "POST /v1/completions", 100)
    requests = {
        "nothing": ([], b""),
        "half a head": (lines[:2], b""),
        "half a body": (lines, b'{"model"'),
        "one request": (request_lines(play_server, "GET /v1/models"), b""),
    }
    with connect(play_server, *requests[sent][0], body=requests[sent][1]) as client:
        assert is_closed(client)


@pytest.mark.usefixtures("short_timeout")
def test_request_sent_too_slowly_is_closed(play_server: PlayServer) -> None:
    """Sending single bytes of the headers or the body does not reset the timeout."""
    for lines in ([], request_lines(play_server, "POST /v1/completions", 100_000)):
        with connect(play_server, *lines) as client:
            assert wait_until(lambda: cannot_send(client))


def cannot_send(client: socket.socket) -> bool:
    try:
        client.sendall(b"x")
    except OSError:
        return True
    return False


@pytest.fixture
def many_files() -> Iterator[None]:
    """Raise the limit of open files for many connections; on macOS it is 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 1000 if hard == resource.RLIM_INFINITY else min(1000, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_idle_connections_do_not_block_new_ones(play_server: PlayServer) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(play_server)) for _ in range(150)]
        for _ in range(10):
            assert play_server.post("/v1/completions", BODY).status_code == 200
        assert is_closed(clients[0]), "the longest-stalled one is closed first"
        newest = clients[-1]
        newest.sendall(
            "".join(f"{line}\r\n" for line in request_lines(play_server, "GET /v1/models")).encode()
        )
        assert newest.recv(1 << 16).startswith(b"HTTP/1.1 200")


@pytest.mark.usefixtures("short_timeout")
def test_client_waiting_for_a_slow_response_is_not_closed(play_server: PlayServer) -> None:
    """Generation may take longer than the client timeout."""
    answer = play_server.post("/v1/completions", BODY | {"max_tokens": 1000})
    assert answer.json()["usage"]["completion_tokens"] == 1000
