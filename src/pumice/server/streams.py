"""Responses in pieces, clients that go away, and errors in the form of either API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pumice.errors import UserError
from pumice.server.wire import Fault, Refused

if TYPE_CHECKING:
    from pumice.server.worker import Chunk

T = TypeVar("T")


class Streamed(StreamingResponse):
    """A response that comes in pieces; what it needs is let go when it is over, however it ends."""

    def __init__(self, pieces: AsyncGenerator[bytes], needs: AsyncExitStack, media_type: str) -> None:
        super().__init__(pieces, media_type=media_type)
        self._pieces, self._needs = pieces, needs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._needs, aclosing(self._pieces):
            await super().__call__(scope, receive, send)


async def unless_gone(request: Request, work: Coroutine[None, None, T]) -> T:
    """The result of some work, which is cancelled when the client goes away. Raises ClientDisconnect then."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for each in (working, gone):
            each.cancel()
        await asyncio.wait((working, gone))
        for each in (working, gone):
            with suppress(asyncio.CancelledError, UserError, Refused):
                each.result()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def merged(sources: Sequence[AsyncIterator[Chunk]]) -> AsyncGenerator[tuple[int, Chunk]]:
    """What several answers give, as it comes, each with the answer's place."""
    if len(sources) == 1:
        async for chunk in sources[0]:
            yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, Chunk] | UserError | None] = asyncio.Queue()

    async def drain(index: int, source: AsyncIterator[Chunk]) -> None:
        try:
            async for chunk in source:
                queue.put_nowait((index, chunk))
            queue.put_nowait(None)
        except UserError as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(drain(index, source)) for index, source in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            found = await queue.get()
            if isinstance(found, UserError):
                raise found
            if found is None:
                left -= 1
            else:
                yield found
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)


def error_object(status: int, message: str) -> dict[str, object]:
    """An error as OpenAI's API has it."""
    kinds = {401: "authentication_error", 404: "not_found_error"}
    usual = "invalid_request_error" if 400 <= status < 500 else "api_error"
    return {"message": message, "type": kinds.get(status, usual), "param": None, "code": None}


def status_of(error: UserError | Refused) -> tuple[int, str]:
    """The status and the words of an error."""
    if isinstance(error, Refused):
        return error.status, error.message
    return 500 if isinstance(error, Fault) else 400, f"{error.message}: {error.hint}"
