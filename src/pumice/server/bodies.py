"""Requests that are long: read where nobody waits for it, and no more of them in memory than there is room for."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request

from pumice.server.wire import Fields, Refused

T = TypeVar("T")

LONG = 1 << 20
"""Bytes from which on a request is read in a thread of its own."""
MOST_VALUES = 2_000_000
"""Commas and opening brackets of a request, in texts too: each is a value, which takes a hundred bytes and keeps Python
from doing anything else while it is made. The longest conversation has a thousandth of it."""
_ALONE = threading.Lock()
"""Held while a long request is read: who else turned the collector off meanwhile could leave it off."""


class Budget:
    """Bytes of all the requests that are under way. Used from one event loop."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0

    def take(self, count: int) -> bool:
        """Whether there is room for so many more, which are held then."""
        if self._held + count > self.limit:
            return False
        self._held += count
        return True

    def give(self, count: int) -> None:
        self._held -= count


async def read(request: Request, struct: str) -> Fields:
    """The object that a request consists of; nothing else keeps its bytes. Raises Refused, ClientDisconnect."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
    if len(body) < LONG:
        return Fields.read(body, struct)
    return await asyncio.to_thread(_long, body, struct)


async def aside(size: int, work: Callable[[], T]) -> T:
    """What so many bytes of a request are made into, in a thread where they are many. Raises what `work` raises."""
    return work() if size < LONG else await asyncio.to_thread(work)


def _long(body: bytearray, struct: str) -> Fields:
    values = sum(body.count(each) for each in b",[{")
    if values > MOST_VALUES:
        raise Refused(400, f"the request has {values} values; {MOST_VALUES} are read at most")
    with _ALONE:
        collects = gc.isenabled()
        gc.disable()  # which would walk all values again and again while they come, and nothing else runs meanwhile
        try:
            return Fields.read(body, struct)
        finally:
            if collects:
                gc.enable()
