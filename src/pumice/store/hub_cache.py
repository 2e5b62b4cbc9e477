"""Models that huggingface_hub has fetched, read where they lie and never changed.

Layout: `models--ORG--NAME/refs/main` holds a commit, whose files are `snapshots/COMMIT`. Facts: huggingface_hub's
documentation of its cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pumice.errors import UserError
from pumice.store.blobs import open_regular
from pumice.store.installed import PART, PARTS, Folder
from pumice.store.names import HOST, TAG, Name

HOSTS = (HOST, "hf.co", "huggingface.co")
"""A name with one of these may mean a repository of the Hub."""

EYES = ("llava", "llava_next", "llava_llama", "llava_mistral")
LISTED = (*EYES, "llama", "mistral", "qwen2", "phi3")
"""What model_type says in the config.json of models that pumice runs. Others lie in the cache too, for other programs;
they are found by name and refused when they are read."""

WORDS = (".json", ".jinja", "tokenizer.model")
"""Ends of the names of small files."""
WHOLE = "pytorch_model"
PICKLES = (WHOLE, "adapter_model", "mm_projector", "non_lora_trainables")
"""How the names of those pickles begin that are read where they must be."""

_FILE = re.compile(rf"({PART})?[^/]*(\.safetensors|\.json|\.jinja|\.model|vocab\.txt|merges\.txt)")

_COMMIT = re.compile(r"[0-9a-f]{40}")


def models(root: Path) -> list[Folder]:
    """Those that pumice may run, and embedding models."""
    found = filter(None, map(_opened, _repositories(root)))
    return [each for each in found if each.embeds or each.config.get("model_type") in LISTED]


def find(root: Path, name: Name) -> Folder | None:
    """The newest snapshot of a repository, whatever the case of its name. None where it is not in the cache."""
    if name.host.lower() not in HOSTS or name.tag.lower() != TAG:
        return None
    wanted = f"models--{name.namespace}--{name.model}".lower()
    found = sorted((each for each in _repositories(root) if each.name.lower() == wanted), key=lambda each: each.name)
    return next((each for each in map(_opened, found) if each), None)


def wanted(names: Sequence[str]) -> list[str]:
    """Of the files of a repository those that pumice reads: none in folders but the parts of an embedding model, no
    pickle beside its safetensors."""
    if PARTS in names:
        return sorted(each for each in names if _FILE.fullmatch(each))
    here = [each for each in names if "/" not in each]
    safe = {each.partition(".")[0].partition("-0")[0] for each in here if each.endswith(".safetensors")}
    pickles = tuple(
        each for each in PICKLES if each not in safe and not (each != "non_lora_trainables" and "model" in safe)
    )
    found = []
    for each in here:
        if each.endswith((".bin", ".bin.index.json")):
            if each.startswith(pickles):
                found.append(each)
        elif each.endswith((".safetensors", *WORDS)):
            found.append(each)
    return sorted(found)


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
