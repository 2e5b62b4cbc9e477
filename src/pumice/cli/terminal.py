"""What stands on the terminal beside an answer: errors, what is going on, what a person types."""

from __future__ import annotations

import gc
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pumice.errors import UserError


def prepare_streams() -> None:
    """Text that a stream's encoding cannot say, in either direction, is escaped instead of ending the process."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def print_error(error: UserError, *, mark: str = "error") -> None:
    """Two lines: what is wrong, and what to do."""
    print(f"{mark}: {_one_line(error.message)}\n{_one_line(error.hint)}", file=sys.stderr)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def read_line(mark: str) -> str:
    """A line that a person types after a mark. The mark is no part of an answer: it stays out of a file that stdout is
    sent to."""
    if sys.stdout.isatty():
        return input(mark)
    print(mark, end="", file=sys.stderr, flush=True)
    return input()


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Say on a terminal's stderr what takes time; a pipe or a log gets nothing."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextmanager
def loading() -> Iterator[None]:
    """Imports, and a model that is loaded: said as by `busy`. Without garbage collection, which would walk all that
    PyTorch and a vocabulary are made of again and again; it stays to the end, and is not walked later either."""
    gc.disable()
    try:
        with busy("loading"):
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def counting() -> Iterator[Callable[[str, int, int], None]]:
    """A bar of questions on a terminal's stderr, told what is under way, how many are done and of how many; a pipe or a
    log gets nothing."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def told(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield told
