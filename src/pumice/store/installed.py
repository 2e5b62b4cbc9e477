"""A model on this disk that is known by its name: in a store of blobs, or as a folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

from pumice.errors import UserError, shortened
from pumice.store.blobs import SMALL_BYTES, Blobs, told
from pumice.store.manifest import Layer, Manifest
from pumice.store.names import Name

Place = Literal["pumice", "Ollama", "Hub", "package", "disk"]
"""Whose a model is: only those of `pumice` are changed."""

PARTS = "modules.json"
"""Names the parts of a model of sentence-transformers."""
PART = r"[0-9]+_[A-Za-z0-9_-]+/"
"""A folder of such a part: `1_Pooling`, `2_Dense`. Others are there for other programs: `onnx`, `openvino`."""

MAX_TEXT_BYTES = SMALL_BYTES
"""Of one template, licence, config: many times the longest."""


@dataclass(frozen=True)
class Stored:
    """A model in a store: a manifest, and blobs."""

    name: Name
    """As it is spelled on disk."""
    manifest: Manifest
    blobs: Blobs
    place: Place
    modified_s: float
    """When the manifest was written, in seconds since 1970."""

    @property
    def title(self) -> str:
        """The name as it is shown."""
        return str(self.name)

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def size(self) -> int:
        """Bytes of all its blobs."""
        return self.manifest.size

    def paths(self, role: str) -> list[Path]:
        """Of the blobs of one role: model, projector, adapter. Raises UserError where one is not there whole."""
        layers = self.manifest.role(role)
        for each in layers:
            if not self.blobs.has(each):
                raise UserError(
                    f"{self.title} has no {role}: {self.blobs.path(each)} is not a file of {each.size} bytes",
                    hint="the store is incomplete; get the model again",
                )
        return [self.blobs.path(each) for each in layers]

    @property
    def path(self) -> Path:
        """The file with the language model. Raises UserError for a model that is not one GGUF file and its eyes."""
        found = self.paths("model")
        if self.manifest.role("adapter"):
            raise UserError(f"{self.title} has an adapter, which pumice cannot apply", hint="name the model without it")
        if len(found) != 1:
            what = f"{len(found)} files" if found else "no GGUF file"
            raise UserError(f"{self.title} has {what} with weights; pumice reads one", hint="name another model")
        return found[0]

    @property
    def beside(self) -> tuple[Path, ...]:
        """The files that belong to `path`: the projector's. Raises UserError where one is missing."""
        return tuple(self.paths("projector"))

    def text(self, role: str) -> str | None:
        """Template or system text: the last of several counts. None where there is none. Raises UserError."""
        texts = self.texts(role)
        return texts[-1] if texts else None

    def texts(self, role: str) -> list[str]:
        """All texts of a role: each licence. Raises UserError for a blob that is missing, damaged or no text."""
        return [self._text(each) for each in self.manifest.role(role)]

    def parameters(self) -> dict[str, object]:
        """What the model wants of sampling, by Ollama's names. Values are numbers, texts, truths or lists of them.

        Raises UserError for what is no JSON object of such.
        """
        found = self._json("params", {})
        if not isinstance(found, dict):
            raise self._wrong("params", "an object")
        for key, value in found.items():
            plain = all(isinstance(each, str | int | float) for each in (value if isinstance(value, list) else [value]))
            if not plain:
                raise self._wrong(f"params, {shortened(key)}", "a number, a text, a truth or a list of them")
        return found

    def messages(self) -> list[tuple[str, str]]:
        """Turns that stand before a conversation: role and text of each. Raises UserError."""
        found = self._json("messages", [])
        turns = found if isinstance(found, list) else [None]
        pairs = [(each.get("role"), each.get("content")) if isinstance(each, dict) else (None, None) for each in turns]
        messages = [(role, text) for role, text in pairs if isinstance(role, str) and isinstance(text, str)]
        if len(messages) < len(pairs):
            raise self._wrong("messages", "a list of objects with role and content")
        return messages

    @cached_property
    def config(self) -> dict[str, object]:
        """What the config blob says: model_family, model_type, file_type… Raises UserError."""
        found = _parsed(self._text(self.manifest.config))
        if not isinstance(found, dict):
            raise self._wrong("config", "an object")
        return found

    def _json(self, role: str, default: object) -> object:
        text = self.text(role)
        return default if text is None else _parsed(text)

    def _text(self, layer: Layer) -> str:
        return self.blobs.read(layer, MAX_TEXT_BYTES).decode("utf-8", errors="replace")

    def _wrong(self, what: str, expected: str) -> UserError:
        return UserError(f"{self.title}: {what} is not {expected}", hint="the model is damaged; get it again")


@dataclass(frozen=True)
class Folder:
    """A model in a checkpoint folder that has a name: in the Hub cache, or in the package. An embedding model may also
    lie anywhere on this disk; its path is its name then."""

    title: str
    path: Path
    place: Place
    commit: str | None = None
    """Of the Hub's repository."""

    beside: tuple[Path, ...] = ()

    @property
    def embeds(self) -> bool:
        """Is it a model of sentence-transformers, which gives vectors and no answers?"""
        return (self.path / PARTS).is_file()

    @property
    def digest(self) -> str:
        """The Hub's commit; for a folder without one, the SHA-256 of its weights."""
        if self.commit is not None:
            return self.commit
        return _told_once(*((path, path.stat().st_mtime_ns) for path in weights(self.path)))

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(path.stat().st_size for path in self._files() if path.exists())

    @property
    def modified_s(self) -> float:
        return self.path.stat().st_mtime

    @cached_property
    def config(self) -> dict[str, object]:
        """What its config.json says; nothing where it cannot be read."""
        path = self.path / "config.json"
        try:
            found = _parsed(path.read_text(encoding="utf-8")) if path.stat().st_size <= MAX_TEXT_BYTES else None
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _files(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.path):
            yield from (Path(folder, name) for name in names)


Installed = Stored | Folder


def weights(folder: Path) -> list[Path]:
    """Its safetensors files, with those of an embedding model's parts."""
    inside = (each for each in folder.glob("*/*.safetensors") if re.fullmatch(PART, f"{each.parent.name}/"))
    return sorted((*folder.glob("*.safetensors"), *inside))


@lru_cache(maxsize=16)
def _told_once(*files: tuple[Path, int]) -> str:
    """The SHA-256 of files that were changed then: lists ask for it again and again."""
    with ExitStack() as opened:
        return told([opened.enter_context(path.open("rb")) for path, _ in files])


def _parsed(text: str) -> object:
    """None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
