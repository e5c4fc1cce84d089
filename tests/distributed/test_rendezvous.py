"""Connections of the control channel: addresses, authentication, unreachable machines."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from mlxgpt.distributed import rendezvous
from mlxgpt.utils.errors import UserError


def test_the_main_address_is_found_without_a_resolvable_hostname(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on many Macs: from the route to other machines, or loopback if there is none."""

    def fail_lookup(name: str) -> str:
        raise socket.gaierror(8, "nodename nor servname provided, or not known")

    class Unconnected(socket.socket):
        def connect(self, address: Any) -> None:
            raise OSError(51, "Network is unreachable")

    class Connected(socket.socket):
        def connect(self, address: Any) -> None:
            pass

        def getsockname(self) -> Any:
            return ("10.1.2.3", 4567)

    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.9")
    assert rendezvous.find_main_address() == "10.0.0.9"
    monkeypatch.setattr(socket, "gethostbyname", fail_lookup)
    monkeypatch.setattr(socket, "socket", Connected)
    assert rendezvous.find_main_address() == "10.1.2.3"
    monkeypatch.setattr(socket, "socket", Unconnected)
    assert rendezvous.find_main_address() == "127.0.0.1"
    monkeypatch.setenv("NCCL_HOST_IP", "10.0.0.1")
    assert rendezvous.find_main_address() == "10.0.0.1"


def test_unauthenticated_connections_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "CONNECT_TIMEOUT", 0.5)
    listener, address = rendezvous.open_listener("127.0.0.1")
    for hello in (
        b"GET / HTTP/1.1\r\n\r\n",
        json.dumps({"password": "guess", "rank": 1, "host": "x"}).encode() + b"\n",
        json.dumps({"password": address["password"], "rank": 7, "host": "x"}).encode() + b"\n",
        json.dumps([1]).encode() + b"\n",
        b"x" * 5000,
    ):
        with socket.create_connection((address["host"], address["port"])) as stranger:
            stranger.sendall(hello)
            stranger.shutdown(socket.SHUT_WR)
    with pytest.raises(UserError, match="no connection from rank 1 within"):
        rendezvous.accept_peers(listener, 2, address["password"])


def test_an_unreachable_address_is_reported() -> None:
    listener, address = rendezvous.open_listener("127.0.0.1")
    listener.close()
    with pytest.raises(UserError, match="cannot connect to rank 0 at 127"):
        rendezvous.connect_to_main({**address, "name": "here"}, 1)
    with pytest.raises(UserError, match="cannot listen on 192"):
        rendezvous.open_listener("192.0.2.1")
