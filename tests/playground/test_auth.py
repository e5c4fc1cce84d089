from __future__ import annotations

import contextlib
import http.client
import json
import math
import random
import socket
from typing import Any

import httpx
import pytest

from mlxgpt.playground import auth
from mlxgpt.playground.auth import MAX_BODY_BYTES
from mlxgpt.utils.errors import UserError
from tests.helpers.play_server import KEY, PlayServer

GET_PATHS = ("/api/run", "/api/curves", "/v1/models", "/v1/models/done", "/nothing")
POST_PATHS = (
    "/api/generate",
    "/api/next_tokens",
    "/api/attention",
    "/api/lens",
    "/api/neighbors",
    "/v1/completions",
    "/v1/chat/completions",
)


@pytest.mark.parametrize("path", [*GET_PATHS, *POST_PATHS])
@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "é"]
)
def test_requests_without_the_key_are_refused(
    served: PlayServer, path: str, authorization: str | None
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    headers = (
        {} if authorization is None else {"Authorization": authorization.encode().decode("latin-1")}
    )
    connection.request("GET" if path in GET_PATHS else "POST", path, headers=headers)
    response = connection.getresponse()
    assert response.status == 401
    assert b"key" in response.read()
    connection.close()


def test_authorization_scheme_is_case_insensitive(served: PlayServer) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert served.get("/v1/models", Authorization=f"{scheme} {KEY}").status_code == 200
    assert served.get("/v1/models", Authorization=f"bearer {KEY.upper()}").status_code == 401


def test_static_files_reveal_nothing(served: PlayServer) -> None:
    for path in ("/", "/static/app.js", "/static/d3-7.9.0.min.js", "/static/play.css"):
        response = served.get(path, Authorization="")
        assert response.status_code == 200
        assert served.folder.name not in response.text.split("/*")[0] or path != "/"
        assert KEY not in response.text
        assert "script-src 'self'" in response.headers["content-security-policy"]
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", "[::1]:{port}"],
)
@pytest.mark.parametrize("path", ["/", "/api/run", "/static/app.js"])
def test_foreign_host_is_refused(served: PlayServer, host: str, path: str) -> None:
    response = served.get(path, Host=host.format(port=served.port))
    assert response.status_code == 403
    assert served.get(path, Host=f"LocalHost:{served.port}").status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://127.0.0.1:1",
        "https://127.0.0.1:{port}",
        "http://127.0.0.1",
    ],
)
def test_foreign_origin_is_refused(served: PlayServer, origin: str) -> None:
    formatted = origin.format(port=served.port)
    for path in GET_PATHS[:3]:
        assert served.get(path, Origin=formatted).status_code == 403
    assert served.post("/api/next_tokens", {"text": "to"}, Origin=formatted).status_code == 403
    same_origin = f"http://127.0.0.1:{served.port}"
    assert served.post("/api/next_tokens", {"text": "to"}, Origin=same_origin).status_code == 200


def test_cors_preflight_is_refused(served: PlayServer) -> None:
    with served.client() as client:
        headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        response = client.options("/api/generate", headers=headers)
    assert response.status_code == 403
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "path",
    [
        "/static/../page.py",
        "/static/..%2fpage.py",
        "/static/%2e%2e/page.py",
        "/static/%2e%2e%2f%2e%2e%2f%2e%2e%2fpyproject.toml",
        "/static//etc/passwd",
        "/static/..\\page.py",
        "/static/%00",
        "/../../etc/passwd",
        "/v1/models/../../api",
    ],
)
def test_path_traversal_is_refused(served: PlayServer, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", f"127.0.0.1:{served.port}")
    connection.putheader("Authorization", f"Bearer {KEY}")
    connection.endheaders()
    response = connection.getresponse()
    assert response.status in (400, 404)
    assert b"import" not in response.read()
    connection.close()


def test_large_body_is_refused(served: PlayServer) -> None:
    response = served.post("/api/generate", {"text": "to" * 5_000_000})
    assert response.status_code == 413


def test_large_chunked_body_is_refused(served: PlayServer) -> None:
    def chunks() -> Any:
        for _ in range(100):
            yield b" " * 100_000

    # The server may disconnect before it has received everything.
    disconnected = contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError)
    with served.client() as client, disconnected:
        assert client.post("/api/next_tokens", content=chunks()).status_code == 413
    assert served.get("/api/run").status_code == 200
    assert MAX_BODY_BYTES < 10_000_000


def test_invalid_content_length_is_refused(served: PlayServer) -> None:
    for length in (b"99999999999999999999999", b"-1", b"1e3"):
        reply = send_raw(
            served,
            b"POST /api/next_tokens HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAuthorization: Bearer %s\r\n"
            b"Content-Length: %s\r\n\r\n" % (served.port, KEY.encode(), length),
        )
        assert reply[9:12] in (b"400", b"413")


def send_raw(served: PlayServer, content: bytes) -> bytes:
    """Send raw bytes and return the reply."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        reply = b""
        try:
            while part := connection.recv(65536):
                reply += part
        except ConnectionResetError:
            pass
    return reply


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 1.5, -0.5, 1e308, 10**30, "", "to", "ü", "\0", "x" * 3000,
    "\ud800", [], [0], [1, 2], [-1], [10**9], ["a"], [[1]], {}, {"a": 1},
    [{"role": "user", "content": "to"}],
)  # fmt: skip
FIELDS = (
    "text", "ids", "step", "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "layer",
    "disabled_heads", "position", "token_id", "model", "prompt", "messages", "n", "stop", "stream",
    "logprobs", "echo", "suffix", "best_of", "repetition_penalty", "stream_options", "top_logprobs",
    "temprature", "grammar", "user", "colour",
)  # fmt: skip


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_requests_cause_no_server_error(served: PlayServer, count: int) -> None:
    rng = random.Random(count)
    accepted = 0
    with served.client() as client:
        for n in range(count):
            path = rng.choice(POST_PATHS)
            body: Any = {name: rng.choice(VALUES) for name in rng.sample(FIELDS, rng.randrange(9))}
            if path.startswith("/v1") and rng.random() < 0.9:
                body["model"] = served.folder.name
            if rng.random() < 0.9:
                body["max_tokens"] = 2
            content = json.dumps(body).encode()
            if n % 4 == 3:
                index = rng.randrange(len(content))
                content = (
                    content[:index]
                    + bytes([rng.randrange(256)])
                    + content[index + rng.randrange(3) :]
                )
            response = client.post(path, content=content)
            assert response.status_code in (200, 400, 404), (path, body, response.text)
            if response.status_code == 200:
                accepted += 1
            else:
                assert response.json()["error"]["message"]
    print(f"{count} requests, {accepted} accepted, the others refused")
    assert count > accepted > count // 50


@pytest.mark.parametrize("count", [60, pytest.param(3_000, marks=pytest.mark.slow)])
def test_random_bytes_cause_no_server_error(served: PlayServer, count: int) -> None:
    rng = random.Random(count)
    valid_request = (
        f"POST /api/next_tokens HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n"
        f'Authorization: Bearer {KEY}\r\nContent-Length: 13\r\n\r\n{{"text":"to"}}'
    ).encode()
    for _ in range(count):
        content = bytearray(valid_request)
        for _ in range(rng.randrange(1, 9)):
            index = rng.randrange(len(content))
            content[index : index + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
        reply = send_raw(served, bytes(content))
        assert not reply.startswith(b"HTTP/1.1 5")
    assert served.get("/api/run").status_code == 200


def test_server_listens_only_on_localhost(served: PlayServer) -> None:
    try:
        infos = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    except socket.gaierror:
        pytest.skip("the host name does not resolve, as on some Macs")
    addresses = {info[4][0] for info in infos}
    for address in addresses - {"127.0.0.1", "127.0.1.1"}:
        with pytest.raises(OSError):  # noqa: PT011
            socket.create_connection((str(address), served.port), timeout=5).close()


def test_error_in_a_stream_has_the_remedy() -> None:
    event = auth.format_sse_error(UserError("it is gone", "open another."))
    assert event.endswith("\n\n")
    tree = json.loads(event.removeprefix("data: "))
    assert tree["error"]["message"] == "it is gone\n→ open another."


def test_responses_are_valid_json() -> None:
    """Even with text that is not UTF-8, such as a folder's name."""
    tree = {"a": "hé 日本 \udcff", "b": [1.5, None]}
    assert json.loads(bytes(auth.FiniteJSONResponse(tree).body)) == tree
    assert "hé 日本".encode() in bytes(auth.FiniteJSONResponse(tree).body)
    assert json.loads(auth.format_sse_event(tree).removeprefix("data: ")) == tree
    for value in (math.nan, math.inf, -math.inf):
        for write in (auth.FiniteJSONResponse, auth.format_sse_event):
            with pytest.raises(UserError, match="not finite"):
                write([{"c": value}])
