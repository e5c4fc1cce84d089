"""A connection with deadlines: for the client's request, and for its reading of the answer."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 100
PATIENCE = 30.0  # seconds without a whole request, or without anything read of an answer


class Connection(H11Protocol):
    """An HTTP/1.1 connection. uvicorn's own has a deadline only for the request after an answer."""

    _awaited: Any = None
    _since = 0.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadlines; of too many connections, close the one that waited longest."""
        super().connection_made(transport)
        self._watch()
        all_open = [cast(Connection, c) for c in self.connections if not c.transport.is_closing()]
        waiting = [c for c in all_open if c is not self and c._what_is_awaited()]
        if len(all_open) >= MOST_CONNECTIONS and waiting:
            min(waiting, key=lambda c: c._since).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the deadlines."""
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Close the connection if its client made no progress for too long; check again later."""
        awaited, now = self._what_is_awaited(), self.loop.time()
        if awaited is None or awaited != self._awaited:
            self._awaited, self._since = awaited, now
        elif now - self._since > PATIENCE:
            # `close` would first wait until the client has read everything.
            self.transport.abort()
            return
        self._timer = self.loop.call_later(PATIENCE / 10, self._watch)

    def _what_is_awaited(self) -> Any:
        """What the client has to do next, a value that changes as it does it; None: nothing."""
        if unsent := self.transport.get_write_buffer_size():
            return "reading", unsent
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            return "request", self.cycle  # another one for each request
        return None
