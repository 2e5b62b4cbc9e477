"""Names to files: paths, the models inside the package, pumice's own store, Ollama's store and the Hub's cache.

Only the own store is ever changed; the others are read where they lie.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pumice.errors import UserError, nearest, shortened
from pumice.store import embedders, hub_cache
from pumice.store.installed import PARTS, Folder, Installed, Stored
from pumice.store.names import Name
from pumice.store.places import hub_folder, ollama_stores, own_store

if TYPE_CHECKING:
    from pumice.checkpoints import Checkpoint

__all__ = [
    "BUNDLED",
    "Files",
    "Folder",
    "Installed",
    "Name",
    "Shelf",
    "Stored",
    "bundled",
    "files",
    "find",
    "installed",
    "own_store",
    "read",
    "resolve",
]

BUNDLED = {"pebble": "pebble-1.6", "pebble:1.6": "pebble-1.6", "pebble:1.5": "pebble-1.5"}
"""Names of the models inside the package, and their folders."""


@dataclass(frozen=True)
class Files:
    """What a name leads to."""

    title: str
    """The name of the model, or the last part of its path."""
    path: Path
    """A checkpoint folder, or a file."""
    beside: tuple[Path, ...] = ()
    """What belongs to it and lies elsewhere: the projector of a model in a store."""
    stored: Stored | None = None
    """The model, where it lies in a store: then `path` is named by the digest of its bytes, which must not change."""


@dataclass(frozen=True)
class Shelf:
    """All models on this machine that have a name, the newest first, and what is wrong with those that cannot be
    read."""

    models: tuple[Installed, ...]
    broken: tuple[UserError, ...]


def files(name: str | Path) -> Files:
    """What a name or a path leads to. In this order: a checkpoint folder, a bundled model, a file, an installed model,
    any folder.

    Raises UserError, with the nearest names, where there is nothing; and for a model that is not there whole.
    """
    path = Path(os.path.expanduser(name))
    # os.path says no, where Path raises, to names that no file can have and to folders that may not be entered.
    if os.path.isdir(path) and os.path.isfile(path / "config.json"):
        return Files(path.absolute().name, path)
    if str(name) not in BUNDLED and os.path.isfile(path):
        return Files(path.absolute().name, path)
    if found := find(str(name)):
        return Files(found.title, found.path, found.beside, found if isinstance(found, Stored) else None)
    if os.path.isdir(path):
        return Files(path.absolute().name, path)
    if os.path.exists(path):
        raise UserError(f"{path} is no folder and no file", hint="give a checkpoint's folder or a .gguf file")
    near = nearest(str(name), [*_names_near(path), *(each.title for each in installed().models)])
    raise UserError(f"there is no model named {shortened(str(name))} here", hint=near)


def resolve(name: str | Path) -> Path:
    """The folder or file of a model, from its name or path. Raises UserError; see `files`."""
    return files(name).path


def read(name: str | Path, *, beside: Sequence[str | Path] = (), template: str | None = None) -> Checkpoint:
    """The checkpoint that a name leads to, with what belongs to it. beside: names or paths of what else it needs, which
    go before what its store has beside it. Raises UserError; see `files` and `checkpoints.read`."""
    from pumice import checkpoints

    found = files(name)
    if os.path.isfile(found.path / PARTS):
        raise UserError(
            f"{found.title} is an embedding model, which gives vectors and answers nothing",
            hint="ask a server for them: pumice serve, then POST /api/embed",
        )
    others = tuple(resolve(each) for each in beside) or found.beside
    if found.stored is None:
        return checkpoints.read(found.path, beside=others, template=template)
    try:
        worded = bool(found.stored.manifest.role("template"))
        return checkpoints.read(found.path, beside=others, template=template, worded=worded)
    except UserError as error:
        # The name of a blob says nothing to anyone.
        raise UserError(f"{found.title}: {error.message}", hint=error.hint) from error


def find(name: str) -> Installed | None:
    """The installed model of a name, whatever its case: from the package, the own store, Ollama's, the Hub's cache.
    What Ollama's users call an embedding model is the Hub's before Ollama's, whose files of it pumice does not run.

    None where there is none, and for what is no name. Raises UserError for a manifest that cannot be read.
    """
    try:
        wanted = Name.parse(name)
    except UserError:
        return None
    if inside := bundled(wanted):
        return _bundled(inside)
    if found := own_store().find(wanted):
        return found
    if (there := embedders.repository(wanted)) and (vectors := hub_cache.find(hub_folder(), Name.parse(there))):
        return vectors
    for store in ollama_stores():
        if found := store.find(wanted):
            return found
    return hub_cache.find(hub_folder(), wanted)


def bundled(name: Name) -> str | None:
    """Which of BUNDLED a name means, whatever its case; None for any other model."""
    return next((each for each in BUNDLED if Name.parse(each).matches(name)), None)


def installed() -> Shelf:
    """Every model that `find` finds, each name once."""
    found: dict[str, Installed] = {each: _bundled(each) for each in BUNDLED if ":" in each}
    broken: list[UserError] = []
    for store in (own_store(), *ollama_stores()):
        models, errors = store.models()
        broken += errors
        for each in models:
            found.setdefault(each.title.lower(), each)
    for repository in hub_cache.models(hub_folder()):
        found.setdefault(f"{repository.title}:latest".lower(), repository)
    newest_first = sorted(found.values(), key=lambda each: (-each.modified_s, each.title))
    return Shelf(tuple(newest_first), tuple(broken))


def _bundled(name: str) -> Folder:
    title = next(each for each, folder in BUNDLED.items() if ":" in each and folder == BUNDLED[name])
    return Folder(title, Path(__file__).resolve().parent.parent / "pebble" / BUNDLED[name], "package")


def _names_near(path: Path) -> list[str]:
    """Bundled names, and folders beside the missing path that look like checkpoints."""
    parent = path.parent
    if not os.path.isdir(parent):
        return list(BUNDLED)
    return [*BUNDLED, *(str(each.parent) for each in parent.glob("*/config.json")), *map(str, parent.glob("*.gguf"))]
