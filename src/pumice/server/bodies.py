"""Requests that are long: read where nobody waits for it, and no more of them in memory than there is room for."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from starlette.requests import Request

from pumice.server.wire import Fields

T = TypeVar("T")

LONG = 1 << 20
"""Bytes from which on a request is read in a thread of its own."""
MOST_VALUES = 2_000_000
"""Commas and opening brackets of a request, in texts too: each may be a value, and Python does nothing else while it
makes them. The longest conversation has a thousandth of it."""
VALUE_BYTES = 192
"""Of memory that one of them takes at most, beside its own: an object in an object."""
_ALONE = threading.Lock()
"""Held while a long request is read: who else turned the collector off meanwhile could leave it off."""


def values(piece: bytes) -> int:
    """So many values a piece of JSON can have at most."""
    return len(piece) - len(piece.translate(None, b",[{"))


def weight(length: int, values: int) -> int:
    """Bytes of memory that so many bytes of a request with so many values take at most, read or not. Text beyond ASCII
    may make it more: a single such character, and all of its text takes up to four bytes a character."""
    return length + VALUE_BYTES * values


class Budget:
    """Bytes of memory for all the requests that are under way. Used from one event loop."""

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

    @contextmanager
    def holding(self, count: int) -> Iterator[bool]:
        """Whether there is room for so many more, which are held to the end of this block then."""
        has_room = self.take(count)
        try:
            yield has_room
        finally:
            if has_room:
                self.give(count)


async def read(request: Request, struct: str) -> Fields:
    """The object that a request consists of; nothing else keeps its bytes. Raises Refused, ClientDisconnect."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
    return await parsed(body, struct)


async def parsed(body: bytes | bytearray, struct: str) -> Fields:
    """The object that a request's body is, in a thread where it is long. Raises Refused."""
    return Fields.read(body, struct) if len(body) < LONG else await asyncio.to_thread(_long, body, struct)


async def aside(size: int, work: Callable[[], T]) -> T:
    """What so many bytes of a request are made into, in a thread where they are many. Raises what `work` raises."""
    return work() if size < LONG else await asyncio.to_thread(work)


def _long(body: bytes | bytearray, struct: str) -> Fields:
    with _ALONE:
        collects = gc.isenabled()
        gc.disable()  # which would walk all values again and again while they come, and nothing else runs meanwhile
        try:
            return Fields.read(body, struct)
        finally:
            if collects:
                gc.enable()
