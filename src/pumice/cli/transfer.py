"""`pumice pull`, `pumice push`: models from a registry or the Hub, and to one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Generator

    from pumice.store.link import Reach
    from pumice.store.transfer import Progress

Pulled = Annotated[
    str,
    typer.Argument(
        help="llava:13b, HOST/USER/MODEL:TAG, hf.co/USER/REPOSITORY:QUANT, or USER/REPOSITORY of the Hub.",
        metavar="NAME",
    ),
]
Pushed = Annotated[str, typer.Argument(help="A model that is here: HOST/USER/MODEL:TAG.", metavar="NAME")]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Allow a registry on this machine or its network, by http."),
]


def pull(name: Pulled, insecure: Insecure = False) -> None:
    """Bring a model to this machine. Stopped and started again, a registry's goes on where it was, the Hub's with the
    file that it was at.

    pumice pull llava:13b
    """
    from pumice.store import pulling

    show(pulling.pull(name, _reach(name, insecure)))


def push(name: Pushed, insecure: Insecure = False) -> None:
    """Give a model to the registry that its name says.

    pumice push registry.example/me/llava:mine
    """
    from pumice.store import pulling

    show(pulling.push(name, _reach(name, insecure)))


def _reach(name: str, insecure: bool) -> Reach:
    from pumice.store.link import Reach

    # Who sits here may ask any host that the machine can reach, once told to.
    return Reach(plain=insecure and not name.startswith("https://"), inner=insecure)


def show(steps: Generator[Progress]) -> None:
    """A bar for each file on a terminal's stderr; lines in a pipe or a log."""
    with closing(steps) as under_way:
        if sys.stderr.isatty():
            _bars(under_way)
        else:
            _lines(under_way)


def _lines(steps: Iterator[Progress]) -> None:
    last = ""
    for step in steps:
        if step.status != last:
            size = f" ({step.total / 1e6:.1f} MB)" if step.total is not None else ""
            print(f"{step.status}{size}", file=sys.stderr, flush=True)
        last = step.status


def _bars(steps: Iterator[Progress]) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=Console(stderr=True)) as bars:
        for step in steps:
            if step.digest is None:
                bars.console.print(step.status, markup=False, highlight=False, soft_wrap=True)
            elif step.completed is None:
                continue
            elif step.status in tasks:
                bars.update(tasks[step.status], completed=step.completed)
            else:
                # What an earlier pull brought is no speed of this one.
                tasks[step.status] = bars.add_task(step.status, total=step.total, completed=step.completed)
