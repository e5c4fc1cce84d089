from __future__ import annotations

import socket
import threading

import httpx
import pytest

from mlxgpt.playground import scheduler, server
from mlxgpt.utils.errors import UserError
from tests.helpers.play_server import PlayServer


def test_pieces_are_sent_at_once() -> None:
    """Asyncio turns off what holds small pieces back for sockets that are known to be TCP's."""
    with server.bind_socket(0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
        assert listener.getsockname()[0] == "127.0.0.1"


def test_a_port_is_taken_once() -> None:
    with server.bind_socket(0) as listener:
        listener.listen()
        with pytest.raises(UserError, match="cannot listen on port"):
            server.bind_socket(listener.getsockname()[1])


def test_too_many_at_once_are_told_so(
    own_server: PlayServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_WAITING", 2)
    answers: list[httpx.Response] = []
    body = {"text": "to", "max_tokens": 1500}

    def ask() -> None:
        answers.append(own_server.post("/api/write", body))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for item in threads:
        item.start()
    for item in threads:
        item.join(60)
    assert sorted(item.status_code for item in answers) == [200, 200, 429, 429]
    refused = next(item for item in answers if item.status_code == 429)
    assert "wait for one" in refused.json()["error"]["message"]
    assert own_server.post("/api/write", body | {"max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/api/write", 405), ("POST", "/api/run", 405)],
)
def test_what_is_not_there(served: PlayServer, method: str, path: str, status: int) -> None:
    with served.client() as client:
        response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["message"]
