from __future__ import annotations

import socket
from typing import Any

import pytest

from mlxgpt.distributed import group as ranks


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLX_HOSTFILE", "MLX_JACCL_COORDINATOR", "NCCL_HOST_IP"):
        monkeypatch.delenv(name, raising=False)


def test_the_first_rank_has_an_address_where_its_name_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on many Macs: by the route to other machines, and without one on this machine alone."""

    def unknown(name: str) -> str:
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
    assert ranks._address() == "10.0.0.9"
    monkeypatch.setattr(socket, "gethostbyname", unknown)
    monkeypatch.setattr(socket, "socket", Connected)
    assert ranks._address() == "10.1.2.3"
    monkeypatch.setattr(socket, "socket", Unconnected)
    assert ranks._address() == "127.0.0.1"
    monkeypatch.setenv("NCCL_HOST_IP", "10.0.0.1")
    assert ranks._address() == "10.0.0.1"
