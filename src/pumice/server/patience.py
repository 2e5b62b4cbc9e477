"""Connections on which nothing is asked. uvicorn waits for the first request of one, and for the end of any request's
headers, for as long as it takes: whoever opens enough of them, or sends a byte now and then, keeps everybody out."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pumice.server.settings import Settings


class Patient(H11Protocol):
    """uvicorn's protocol, which hangs up where no request comes: `uvicorn.Config(app, http=Patient)`. The headers of
    each must be there after twice this time at most; bodies are the guard's, and answers take their time."""

    head_s = Settings.request_read_s / 4

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._asked, self._is_left = self.scope, False
        self._timer = self.loop.call_later(self.head_s, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        if self._is_left:  # closed at the last look already, and what was still to be sent nobody takes
            self.transport.abort()
            return
        if self.conn.their_state is h11.IDLE and self.scope is self._asked:  # no request since the last look
            self.transport.close()
        self._asked, self._is_left = self.scope, self.transport.is_closing()
        self._timer = self.loop.call_later(self.head_s, self._look)
