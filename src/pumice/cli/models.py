"""`pumice list`, `pumice rm`, `pumice cp`: the models on this machine, in Ollama's words and columns."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from pumice import store
from pumice.errors import UserError, nearest

FROM = {"pumice": "", "Ollama": "Ollama's store", "Hub": "Hub cache", "package": "this package"}
"""Where a model lies that is not in the own store."""


def list_models(
    prefix: Annotated[
        str, typer.Argument(help="Only names that begin so.", metavar="[PREFIX]", show_default=False)
    ] = "",
) -> None:
    """List the models on this machine: the newest first, and whose they are."""
    shelf = store.installed()
    now = time.time()
    rows = [
        (each.title, each.digest[:12], size(each.size), ago(now - each.modified_s), FROM[each.place])
        for each in shelf.models
        if each.title.lower().startswith(prefix.lower())
    ]
    for line in table(("NAME", "ID", "SIZE", "MODIFIED", "FROM"), rows):
        print(line)
    for error in shelf.broken:
        print(f"warning: {error.message}", file=sys.stderr)


def remove(models: Annotated[list[str], typer.Argument(help="Names of models.", metavar="MODEL")]) -> None:
    """Remove models from pumice's own store."""
    for text in models:
        try:
            name = store.Name.parse(text)
        except UserError as error:
            raise UserError(f"model '{text}' not found", hint=error.hint) from error
        if store.own_store().remove(name) is None:
            raise _not_own(text)
        print(f"deleted '{text}'")


def _not_own(name: str) -> UserError:
    if other := store.find(name):
        return UserError(
            f"'{name}' lies in {FROM[other.place]}, which pumice leaves as it is",
            hint="remove it with the program that put it there",
        )
    return UserError(f"model '{name}' not found", hint=_near(name))


def copy(
    source: Annotated[str, typer.Argument(help="A model in a store.", metavar="SOURCE")],
    destination: Annotated[str, typer.Argument(help="Its second name.", metavar="DESTINATION")],
) -> None:
    """Give a model a second name in pumice's own store."""
    _checked(source, "source")
    name = _checked(destination, "destination")
    model = store.find(source)
    if model is None:
        raise UserError(f'model "{source}" not found', hint=_near(source))
    if not isinstance(model, store.Stored):
        raise UserError(f"{model.title} is a folder, {model.path}", hint="its name is that of its place")
    store.own_store().copy(model, name)
    print(f"copied '{source}' to '{destination}'")


def _checked(text: str, what: str) -> store.Name:
    try:
        name = store.Name.parse(text)
    except UserError as error:
        raise UserError(f'{what} "{text}" is invalid', hint=error.hint) from error
    if what == "destination" and store.bundled(name):
        raise UserError(f'{what} "{text}" is invalid', hint="it is the name of a model inside the package")
    return name


def _near(name: str) -> str:
    return nearest(name, [each.title for each in store.installed().models])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Ollama's: columns as wide as their longest cell and four spaces, the last one too."""
    widths = [max(map(len, column)) + 4 for column in zip(head, *rows)]
    for row in (head, *rows):
        yield "".join(cell.ljust(width) for cell, width in zip(row, widths))


def size(count: int) -> str:
    """Bytes as Ollama shows them: `4.7 GB`, `12 GB`, `624 MB`, `0 B`. Its format/bytes.go."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if count >= unit:
            few = count < 10 * unit and count % unit
            return f"{count / unit:.1f} {name}" if few else f"{count // unit} {name}"
    return f"{count} B"


def ago(seconds: float) -> str:
    """A time before now, or after it, as Ollama shows it: `3 weeks ago`. Its format/time.go."""
    return f"{_span(abs(seconds))} {'ago' if seconds >= 0 else 'from now'}"


def _span(seconds: float) -> str:
    whole, minutes, hours = int(seconds), int(seconds // 60), int(seconds / 3600 + 0.5)
    if whole < 60:
        return {0: "Less than a second", 1: "1 second"}.get(whole, f"{whole} seconds")
    if minutes < 60:
        return "About a minute" if minutes == 1 else f"{minutes} minutes"
    if hours < 48:
        return "About an hour" if hours == 1 else f"{hours} hours"
    for below_days, days, unit in ((14, 1, "days"), (60, 7, "weeks"), (2 * 365, 30, "months")):
        if hours < 24 * below_days:
            return f"{hours // 24 // days} {unit}"
    return f"{int(seconds // 3600) // 24 // 365} years"
