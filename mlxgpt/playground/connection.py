"""A connection whose client may not let it wait: for a request, or until it reads the answer."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 100
PATIENCE = 30.0  # seconds without a whole request, or without anything read of an answer


class Connection(H11Protocol):
    """As uvicorn's, which has no deadline but for an idle client after an answer."""

    _awaited: Any = None
    _since = 0.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Where there are too many, close the one whose client has let it wait longest."""
        super().connection_made(transport)
        self._watch()
        all_open = [cast(Connection, c) for c in self.connections if not c.transport.is_closing()]
        waiting = [c for c in all_open if c is not self and c._what_is_awaited()]
        if len(all_open) >= MOST_CONNECTIONS and waiting:
            min(waiting, key=lambda c: c._since).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Watch it no longer."""
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Close the connection if its client has done nothing of what is awaited for too long."""
        awaited, now = self._what_is_awaited(), self.loop.time()
        if awaited is None or awaited != self._awaited:
            self._awaited, self._since = awaited, now
        elif now - self._since > PATIENCE:
            # At once: closing would first send what the client does not read.
            self.transport.abort()
            return
        self._timer = self.loop.call_later(PATIENCE / 10, self._watch)

    def _what_is_awaited(self) -> Any:
        """What the client is to do next, which changes as it does it; None where it is our turn."""
        if unsent := self.transport.get_write_buffer_size():
            return "reading", unsent
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            return "request", self.cycle  # made anew by the head of each request
        return None
