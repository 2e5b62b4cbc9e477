"""Work that calls back while it goes on, as steps that can be waited for one by one, and left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

TOLD_EVERY_S = 0.06
"""Seconds between two reports, as Ollama's."""


Step = TypeVar("Step")
Result = TypeVar("Result")


class _Left(BaseException):
    """Nobody waits for this work any more. Of no kind that work catches."""


def following(work: Callable[[Callable[[Step], None]], Result]) -> Generator[Step, None, Result]:
    """Do `work` in a thread of its own and yield the newest step that it tells of; what it returns is returned, what it
    raises is raised here. Closing ends the work when it next tells a step, and waits for that."""
    newest: list[Step] = []
    left, news = threading.Event(), threading.Event()

    def told(step: Step) -> None:
        if left.is_set():
            raise _Left
        newest[:] = [step]
        news.set()

    with ThreadPoolExecutor(1) as threads:
        doing = threads.submit(work, told)
        doing.add_done_callback(lambda _: news.set())
        try:
            while not doing.done():
                news.wait()
                news.clear()
                if newest:
                    yield newest.pop()
                with suppress(TimeoutError):
                    doing.exception(TOLD_EVERY_S)
        finally:
            left.set()
    if newest:
        yield newest.pop()
    return doing.result()
