"""HTTP connections with timeouts for slow clients: sending requests, reading responses."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 100
CLIENT_TIMEOUT = 30.0  # seconds without a complete request, or without reading any of a response


class TimeoutH11Protocol(H11Protocol):
    """HTTP/1.1 connection with timeouts; uvicorn's own only has one between two requests."""

    _last_progress: Any = None
    _last_progress_time = 0.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout; if there are too many connections, close the longest-stalled one."""
        super().connection_made(transport)
        self._check_timeout()
        open_connections = [
            cast(TimeoutH11Protocol, c) for c in self.connections if not c.transport.is_closing()
        ]
        stalled = [c for c in open_connections if c is not self and c._client_progress()]
        if len(open_connections) >= MAX_CONNECTIONS and stalled:
            min(stalled, key=lambda c: c._last_progress_time).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeout."""
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def _check_timeout(self) -> None:
        """Close the connection if its client has stalled for too long, else check again later."""
        progress, now = self._client_progress(), self.loop.time()
        if progress is None or progress != self._last_progress:
            self._last_progress, self._last_progress_time = progress, now
        elif now - self._last_progress_time > CLIENT_TIMEOUT:
            # `close` would wait for the client to read everything.
            self.transport.abort()
            return
        self._timer = self.loop.call_later(CLIENT_TIMEOUT / 10, self._check_timeout)

    def _client_progress(self) -> Any:
        """A value that changes as the client makes progress; None if none is expected of it."""
        if unsent := self.transport.get_write_buffer_size():
            return "reading", unsent
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            return "request", self.cycle  # a new object for each request
        return None
