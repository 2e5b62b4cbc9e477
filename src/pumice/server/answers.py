"""From a request to an answer, the same for both APIs: find the model, wait for a turn, read, ask, count."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from starlette.requests import Request
from starlette.types import Scope

from pumice.errors import UserError
from pumice.server.asked import Asked, Ready, context_ids, ready
from pumice.server.calls import named_tools, with_calls
from pumice.server.loaded import Resident
from pumice.server.logs import note
from pumice.server.metrics import Finished, Reason
from pumice.server.residents import Residents

if TYPE_CHECKING:
    from pumice.answer import Answer, Answering
    from pumice.question import Question
    from pumice.server.worker import Chunk
    from pumice.store import Installed


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


@dataclass(frozen=True)
class Call:
    """Who asks which model, when, for what, and how long it is to stay: None leaves that as it is."""

    request: Request
    name: str
    installed: Installed
    keep_ns: int | None
    came_s: float
    to: Literal["chat", "generate"]


@asynccontextmanager
async def begun(residents: Residents, call: Call, asked: Asked, count: int = 1) -> AsyncIterator[list[Coming]]:
    """So many answers to a request, which has one turn for all of them. Leaving the block cancels what has not come.

    Raises Refused and UserError before the first chunk of each is there.
    """
    use = residents.use(call.name, call.installed, call.keep_ns, call.to)
    async with use as resident, resident.turn, AsyncExitStack() as needs:
        clock = Clock(call.came_s, time.monotonic())
        model = resident.model

        def read() -> tuple[Ready, list[Answering]]:
            found = ready(asked, model, resident.contexts, resident.context)
            return found, [model.open(nth(found.question, number), found.seen) for number in range(count)]

        found, opened = await residents.read(read)
        coming = []
        for answering in opened:
            tally = Tally(resident, answering, call)
            needs.callback(tally.finish, residents)
            chunks = await needs.enter_async_context(aclosing(resident.worker.answer(answering)))
            first = await anext(chunks)
            tally.first_s = time.monotonic() - call.came_s
            watched = tally.watched(first, chunks)
            tools = named_tools(asked.tools)
            coming.append(Coming(clock, found, resident, with_calls(watched, tools) if tools else watched))
        yield coming


def nth(question: Question, number: int) -> Question:
    """Of several answers each has a seed of its own."""
    seed = question.sampling.seed
    if seed is None or not number:
        return question
    return replace(question, sampling=replace(question.sampling, seed=(seed + number) % 2**63))


@dataclass
class Tally:
    """What becomes of one answer, for the metrics."""

    resident: Resident
    answering: Answering
    call: Call
    first_s: float | None = None
    answer: Answer | None = None
    failed: bool = False

    async def watched(self, first: Chunk, rest: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
        self.answer = first.answer
        yield first
        try:
            async for chunk in rest:
                self.answer = chunk.answer
                yield chunk
        except UserError:
            self.failed = True
            raise

    def finish(self, residents: Residents) -> None:
        """Count it, and note it in the log's line of its request."""
        answering, answer = self.answering, self.answer
        unended: Reason = "error" if self.failed or self.first_s is None else "abort"
        finished = Finished(
            model=self.resident.installed.title,
            reason=answer.finish_reason if answer else unended,
            prompt_tokens=len(answering.request.ids),
            cached_tokens=answer.cached_tokens if answer else 0,
            generated_tokens=len(answering.steps),
            images=len(answering.request.images),
            first_token_s=self.first_s,
            whole_s=time.monotonic() - self.call.came_s,
        )
        residents.metrics.finished(finished)
        _note(self.call.request.scope, finished)


def _note(scope: Scope, finished: Finished) -> None:
    """What became of an answer, in the log's line of its request."""
    note(scope, "model", finished.model)
    note(scope, "reason", finished.reason)
    note(scope, "images", finished.images)
    note(scope, "prompt_tokens", finished.prompt_tokens)
    note(scope, "cached_tokens", finished.cached_tokens)
    note(scope, "generated_tokens", finished.generated_tokens)
