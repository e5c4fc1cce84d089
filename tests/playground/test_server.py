from __future__ import annotations

import socket
import threading

import httpx
import pytest

from mlxgpt.playground import scheduler, server
from mlxgpt.utils.errors import UserError
from tests.helpers.play_server import PlayServer


def test_socket_is_created_for_tcp() -> None:
    """Asyncio sets TCP_NODELAY only for sockets with this protocol number."""
    with server.bind_socket(0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
        assert listener.getsockname()[0] == "127.0.0.1"


def test_port_in_use_is_refused() -> None:
    with server.bind_socket(0) as listener:
        listener.listen()
        with pytest.raises(UserError, match="cannot listen on port"):
            server.bind_socket(listener.getsockname()[1])


def test_too_many_concurrent_requests_are_refused(
    own_server: PlayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_WAITING", 2)
    answers: list[httpx.Response] = []
    body = {"text": "to", "max_tokens": 1500}

    def send_request() -> None:
        answers.append(own_server.post("/api/generate", body))

    threads = [threading.Thread(target=send_request) for _ in range(4)]
    for item in threads:
        item.start()
    for item in threads:
        item.join(60)
    assert sorted(item.status_code for item in answers) == [200, 200, 429, 429]
    refused = next(item for item in answers if item.status_code == 429)
    assert "wait for one" in refused.json()["error"]["message"]
    assert own_server.post("/api/generate", body | {"max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/api/generate", 405), ("POST", "/api/run", 405)],
)
def test_unknown_paths_and_methods(served: PlayServer, method: str, path: str, status: int) -> None:
    with served.client() as client:
        response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["message"]
