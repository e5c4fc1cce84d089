"""How ranks find each other: addresses, and the connections of the control channel.

The main rank accepts connections only until all ranks have connected. Ranks authenticate with the
job's password, which is distributed by an MLX all-reduce.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import time
from typing import Any

from mlxgpt.distributed.control import Peer
from mlxgpt.distributed.launcher import read_hostfile
from mlxgpt.utils.errors import UserError


def find_main_address() -> str:
    """The main rank's address, as set by the launcher."""
    if host_addresses := read_hostfile():
        return host_addresses[0]
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        return coordinator.rpartition(":")[0]
    return os.environ.get("NCCL_HOST_IP") or _find_own_address()


def _find_own_address() -> str:
    """This machine's address: of its host name or, if that does not resolve (common on macOS), of
    its route to other machines.
    """
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.connect(("192.0.2.1", 9))  # reserved for documentation (RFC 5737); sends nothing
        return str(udp.getsockname()[0])
    return "127.0.0.1"


def open_listener(host: str) -> tuple[socket.socket, dict[str, Any]]:
    """Listen on a free port of the main rank. Returns the listening socket, and the address and
    password for the other ranks.

    Raises:
        UserError: if this machine cannot listen on `host`.
    """
    try:
        listener = socket.create_server((host, 0))
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, the address of rank 0: {error.strerror}",
            "list the first machine under its own address in the hostfile.",
        ) from error
    password = secrets.token_hex(16)
    return listener, {"host": host, "port": listener.getsockname()[1], "password": password}


CONNECT_TIMEOUT = 30.0  # seconds for all ranks to connect


def accept_peers(listener: socket.socket, size: int, password: str) -> dict[int, Peer]:
    """Accept connections from all other ranks, on the main rank; returns the peers by rank.

    Raises:
        UserError: if a rank does not connect in time.
    """
    peers: dict[int, Peer] = {}
    deadline = time.monotonic() + CONNECT_TIMEOUT
    with listener:
        while len(peers) < size - 1:
            listener.settimeout(max(0.1, deadline - time.monotonic()))
            connection = None
            try:
                connection, _ = listener.accept()
                connection.settimeout(2.0)
                hello = json.loads(_read_line(connection))
                is_authentic = hmac.compare_digest(str(hello["password"]), password)
                rank, host = int(hello["rank"]), str(hello["host"])
                if not is_authentic or not 0 < rank < size or rank in peers:
                    raise ValueError("not a rank of this job")
            except (OSError, ValueError, KeyError, TypeError):
                if connection:
                    connection.close()
                if time.monotonic() > deadline:
                    missing = ", ".join(str(n) for n in range(1, size) if n not in peers)
                    raise UserError(
                        f"no connection from rank {missing} within {CONNECT_TIMEOUT:.0f} s",
                        "check the firewall: the machines must reach each other on all ports.",
                    ) from None
                continue
            peers[rank] = _make_peer(rank, host, connection)
    return peers


def connect_to_main(address: dict[str, Any], rank: int) -> dict[int, Peer]:
    """Connect to the main rank; returns it as the only peer.

    Raises:
        UserError: if it cannot be reached.
    """
    try:
        connection = socket.create_connection((address["host"], address["port"]), CONNECT_TIMEOUT)
    except OSError as error:
        raise UserError(
            f"cannot connect to rank 0 at {address['host']}: {error.strerror or error}",
            "check the firewall: the machines must reach each other on all ports.",
        ) from error
    peer = _make_peer(0, address["name"], connection)
    peer.send({"password": address["password"], "rank": rank, "host": socket.gethostname()})
    return {0: peer}


def _make_peer(rank: int, host: str, connection: socket.socket) -> Peer:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Peer(rank, host, connection)


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < 1000:
        byte = connection.recv(1)
        if not byte:
            raise ValueError("the connection was closed")
        line += byte
    return line
