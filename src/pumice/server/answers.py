"""From a request to an answer, the same for both APIs: find the model, wait for a turn, read, ask, count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pumice.errors import UserError
from pumice.server.asked import Asked, Ready, context_ids, ready
from pumice.server.residents import Resident, Residents
from pumice.server.wire import Refused

if TYPE_CHECKING:
    from pumice.answer import Answer, Answering
    from pumice.server.worker import Chunk


T = TypeVar("T")


@dataclass(frozen=True)
class Clock:
    """When a request came, and when its model was there: seconds of a monotonic clock."""

    came_s: float
    loaded_s: float

    def durations(self, answer: Answer) -> dict[str, int]:
        """Ollama's counters, in nanoseconds; those that are zero are left out."""
        timings = answer.timings
        total_s = time.monotonic() - self.came_s
        found = {
            "total_duration": int(total_s * 1e9),
            "load_duration": int((self.loaded_s - self.came_s) * 1e9),
            "prompt_eval_count": answer.prompt_tokens,
            "prompt_eval_duration": int((timings.encode_s + timings.prefill_s) * 1e9),
            "eval_count": len(answer.tokens),
            "eval_duration": int(timings.decode_s * 1e9),
        }
        return {name: count for name, count in found.items() if count}


@dataclass(frozen=True)
class Coming:
    """An answer that has begun: its first chunk was there before anything was sent, so that what is wrong is said with
    a status."""

    clock: Clock
    ready: Ready
    resident: Resident
    chunks: AsyncIterator[Chunk]

    def context(self, answer: Answer) -> list[int]:
        """The ids that stand for the conversation from now on; it is kept under them."""
        ids = context_ids(self.ready.seen, answer.tokens, self.resident.model.config.image_token_id)
        self.resident.contexts.keep(ids, self.ready.asked, answer.text)
        return ids

    async def whole(self) -> tuple[str, list[Chunk], Answer]:
        """All of it. Raises what it fails with."""
        chunks = [chunk async for chunk in self.chunks]
        answer = chunks[-1].answer
        assert answer is not None, "an answer ended without its end"
        return "".join(chunk.text for chunk in chunks), chunks, answer


@asynccontextmanager
async def begun(
    residents: Residents, name: str, asked: Asked, keep_ns: int | None, came_s: float
) -> AsyncIterator[Coming]:
    """The answer to a request. Leaving the block cancels what has not come.

    Raises Refused and UserError before its first chunk is there.
    """
    async with residents.use(name, keep_ns) as resident, resident.turn:
        clock = Clock(came_s, time.monotonic())
        model = resident.model

        def read() -> tuple[Ready, Answering]:
            found = ready(asked, model, resident.contexts)
            return found, model.open(found.question, found.seen)

        found, answering = await residents.read(read)
        async with aclosing(resident.worker.answer(answering)) as chunks:
            first = await anext(chunks)
            yield Coming(clock, found, resident, _with(first, chunks))


class Streamed(StreamingResponse):
    """A response that comes in pieces; what it needs is let go when it is over, however it ends."""

    def __init__(self, pieces: AsyncIterator[bytes], needs: AsyncExitStack, media_type: str) -> None:
        super().__init__(pieces, media_type=media_type)
        self._needs = needs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._needs:
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
            with suppress(asyncio.CancelledError, UserError, Refused):
                await each


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _with(first: Chunk, rest: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    yield first
    async for chunk in rest:
        yield chunk


async def merged(sources: Sequence[AsyncIterator[Chunk]]) -> AsyncIterator[tuple[int, Chunk]]:
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


def error_object(status: int, message: str) -> dict[str, object]:
    """An error as OpenAI's API has it."""
    kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
    return {"message": message, "type": kinds.get(status, "api_error"), "param": None, "code": None}


def status_of(error: UserError | Refused) -> tuple[int, str]:
    """The status and the words of an error."""
    if isinstance(error, Refused):
        return error.status, error.message
    return 400, f"{error.message}: {error.hint}"
