"""One thread that runs a model's engine for all who ask it, and hands what comes to the event loop.

Requests are started and cancelled by that thread alone, between two steps: nobody waits for the engine's lock.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pumice.errors import UserError
from pumice.server.wire import Fault

if TYPE_CHECKING:
    from pumice.answer import Answer, Answering, Likely
    from pumice.engine import Step
    from pumice.model import Model
    from pumice.server.calls import ToolCall

REPEATS = 30
"""So many times the same token, and the answer is ended; Ollama's number."""
BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
        ValueError)  # fmt: skip
"""What an engine may fail with that is no UserError."""
LESS_URGENT = 5
"""Niceness of the engine's threads (Linux): they keep all cores busy, and who takes a piece of an answer on, here or in
a client on this machine, would wait until their turn is over."""
GONE = Fault("the model was unloaded", hint="ask again")


@dataclass(frozen=True)
class Chunk:
    """What has come of an answer since the last one. `answer` and `calls` come with the last."""

    text: str
    likely: tuple[Likely, ...] = ()
    answer: Answer | None = None
    calls: tuple[ToolCall, ...] = ()


@dataclass(eq=False)
class Job:
    """An answer under way: what is in `chunks` was not taken yet. An error ends it."""

    answering: Answering
    loop: asyncio.AbstractEventLoop
    chunks: asyncio.Queue[Chunk | UserError] = field(default_factory=asyncio.Queue)
    unwanted: bool = False
    ended: bool = False
    told: int = 0
    """Steps whose probabilities were told."""


class Worker:
    """Runs until `close`. `seen_alive_s` is when it last came round, by the monotonic clock."""

    def __init__(self, model: Model, name: str) -> None:
        self._model = model
        self._wake = threading.Condition()
        self._arrived: list[Job] = []
        self._active: list[Job] = []
        self._closing = False
        self.seen_alive_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"engine of {name}", daemon=True)
        self._thread.start()

    async def answer(self, answering: Answering) -> AsyncGenerator[Chunk]:
        """The answer as it comes. Who stops reading cancels it. Raises what it failed with."""
        job = Job(answering, asyncio.get_running_loop())
        self._hand(job)
        try:
            while True:
                chunk = await job.chunks.get()
                if isinstance(chunk, UserError):
                    raise chunk
                yield chunk
                if chunk.answer is not None:
                    return
        finally:
            job.unwanted = True
            with self._wake:
                self._wake.notify()

    @property
    def waiting(self) -> int:
        """Answers under way."""
        return len(self._active) + len(self._arrived)

    @property
    def silent_s(self) -> float:
        """For how long there was work and no step came to its end."""
        return time.monotonic() - self.seen_alive_s if self.waiting else 0.0

    @property
    def alive(self) -> bool:
        """Whether it takes questions: not after `close`, nor after a bug of ours."""
        return not self._closing

    def close(self) -> None:
        """Answers under way fail; returns when the thread has ended."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _hand(self, job: Job) -> None:
        with self._wake:
            if self._closing:
                raise GONE
            if not self.waiting:
                self.seen_alive_s = time.monotonic()
            self._arrived.append(job)
            self._wake.notify()

    def _run(self) -> None:
        _step_back()
        end = GONE
        try:
            while self._admit():
                self._model.step()
                self.seen_alive_s = time.monotonic()
                self._deliver()
        except BUGS as bug:
            # What it leaves of the engine nobody knows: the model is loaded afresh for the next question.
            logging.getLogger("pumice").error("the engine failed; its model is given up", exc_info=bug)
            end = Fault(f"the engine failed: {type(bug).__name__}", hint="the server's log says more; ask again")
        finally:
            with self._wake:
                self._closing = True
                left, self._active, self._arrived = [*self._active, *self._arrived], [], []
            _put([(job, end) for job in left])

    def _admit(self) -> bool:
        """Wait for work, start what has arrived, cancel what nobody wants any more. False: it is over."""
        with self._wake:
            while not (self._active or self._arrived or self._closing):
                self._wake.wait()
            if self._closing:
                return False
            arrived, self._arrived = self._arrived, []
            self._active += arrived
        for job in arrived:
            try:
                job.answering.start()
            except UserError as error:
                self._active.remove(job)
                _put([(job, error)])
        for job in [each for each in self._active if each.unwanted]:
            job.answering.cancel()
            self._active.remove(job)
        return True

    def _deliver(self) -> None:
        """Hand over what came, to each event loop at once."""
        found: list[tuple[Job, Chunk | UserError]] = []
        for job in self._active:
            try:
                chunk = self._chunk(job)
            except UserError as problem:
                job.ended, chunk = True, problem
            if chunk is not None:
                found.append((job, chunk))
        self._active = [each for each in self._active if not each.ended]
        _put(found)

    def _chunk(self, job: Job) -> Chunk | UserError | None:
        answering = job.answering
        text, ended = answering.take(), answering.ended
        if not ended and _stutters(answering.steps):
            answering.cancel()
            ended = True
        likely = answering.likely(job.told)
        job.told, job.ended = len(answering.steps), ended
        if ended:
            return Chunk(text, likely, answering.answer())
        return Chunk(text, likely) if text or likely else None


def _stutters(steps: Sequence[Step]) -> bool:
    """Whether an answer says one thing again and again."""
    last = steps[-REPEATS:]
    return len(last) == REPEATS and len({each.token for each in last}) == 1


def _put(found: Sequence[tuple[Job, Chunk | UserError]]) -> None:
    loops = {job.loop for job, _ in found}
    for loop in loops:
        mine = [(job.chunks, chunk) for job, chunk in found if job.loop is loop]
        with suppress(RuntimeError):  # the loop has ended, and everybody with it
            loop.call_soon_threadsafe(_put_all, mine)


def _put_all(found: Sequence[tuple[asyncio.Queue[Chunk | UserError], Chunk | UserError]]) -> None:
    for queue, chunk in found:
        queue.put_nowait(chunk)


def _step_back() -> None:
    """This thread, and those that it starts to compute, are less urgent than the others."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + LESS_URGENT)
