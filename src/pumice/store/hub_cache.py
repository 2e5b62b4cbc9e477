"""Models that huggingface_hub has fetched, read where they lie and never changed.

Layout: `models--ORG--NAME/refs/main` holds a commit, whose files are `snapshots/COMMIT`. Facts: huggingface_hub's
documentation of its cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pumice.errors import UserError
from pumice.store.blobs import open_regular
from pumice.store.installed import Folder
from pumice.store.names import HOST, TAG, Name

HOSTS = (HOST, "hf.co", "huggingface.co")
"""A name with one of these may mean a repository of the Hub."""

EYES = ("llava", "llava_next", "llava_llama", "llava_mistral")
LISTED = (*EYES, "llama", "mistral", "qwen2", "phi3")
"""What model_type says in the config.json of models that pumice runs. Others lie in the cache too, for other programs;
they are found by name and refused when they are read."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


def models(root: Path) -> list[Folder]:
    """Those that pumice may run."""
    return [each for each in map(_opened, _repositories(root)) if each and each.config.get("model_type") in LISTED]


def find(root: Path, name: Name) -> Folder | None:
    """The newest snapshot of a repository, whatever the case of its name. None where it is not in the cache."""
    if name.host.lower() not in HOSTS or name.tag.lower() != TAG:
        return None
    wanted = f"models--{name.namespace}--{name.model}".lower()
    found = sorted((each for each in _repositories(root) if each.name.lower() == wanted), key=lambda each: each.name)
    return next((each for each in map(_opened, found) if each), None)


def _repositories(root: Path) -> Iterator[Path]:
    try:
        yield from sorted(each for each in root.iterdir() if each.name.startswith("models--"))
    except OSError:
        return


def _opened(repository: Path) -> Folder | None:
    """None for what is no repository of two names with a snapshot."""
    _, *parts = repository.name.split("--")
    try:
        with open_regular(repository / "refs" / "main") as file:
            commit = file.read(64).decode("ascii", errors="replace").strip()
        if len(parts) != 2 or not _COMMIT.fullmatch(commit):
            return None
        Name(HOST, parts[0], parts[1], TAG)
    except (OSError, UserError):
        return None
    snapshot = repository / "snapshots" / commit
    return Folder("/".join(parts), snapshot, "Hub", commit) if snapshot.is_dir() else None
