"""A store in Ollama's layout: `manifests/HOST/NAMESPACE/MODEL/TAG`, and `blobs/`.

A manifest is written last and whole, so that what has a name is complete; whoever is stopped before leaves blobs that
nothing names. Changes are made one at a time, by a lock on the folder.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pumice.errors import UserError
from pumice.store.blobs import Blobs, locked, open_regular, sync_folder, writing
from pumice.store.installed import Place, Stored
from pumice.store.manifest import MAX_MANIFEST_BYTES, Layer, Manifest
from pumice.store.names import Name

_BLOB = re.compile(r"sha256-[0-9a-f]{64}")


class Store:
    """The models in one folder, to be read: Ollama's own, for one."""

    def __init__(self, root: Path, place: Place) -> None:
        self.root, self.place, self.blobs = root, place, Blobs(root)
        self._manifests = root / "manifests"

    def models(self) -> tuple[list[Stored], list[UserError]]:
        """All models, and what is wrong with each manifest that cannot be read. Files that begin with a dot or have no
        model's name are passed over."""
        found, broken = [], []
        for path, name in self._named():
            try:
                found.append(self._opened(path, name))
            except UserError as error:
                broken.append(error)
        return found, broken

    def find(self, name: Name) -> Stored | None:
        """The model of this name, whatever its case; of several the one that is spelled the same. Raises UserError for
        a manifest that cannot be read."""
        path = self._path(name)
        return None if path is None else self._opened(path, Name(*path.parts[-4:]))

    def _path(self, name: Name) -> Path | None:
        return next(_spelled(self._manifests, name.parts), None)

    def _named(self) -> Iterator[tuple[Path, Name]]:
        for path in _below(self._manifests, 4):
            with suppress(UserError):
                yield path, Name(*path.parts[-4:])

    def _opened(self, path: Path, name: Name) -> Stored:
        try:
            with open_regular(path) as file:
                raw, modified_s = file.read(MAX_MANIFEST_BYTES + 1), os.fstat(file.fileno()).st_mtime
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{path} cannot be read: {why}", hint="check who may read it") from error
        return Stored(name, Manifest.read(raw, str(path)), self.blobs, self.place, modified_s)


YOUNG_S = 600.0
"""Blobs that came so lately are not removed with the model that is replaced."""


class OwnStore(Store):
    """The store that pumice keeps, and the only one that it changes."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, "pumice")

    def write(self, name: Name, manifest: Manifest) -> Name:
        """Give a name to blobs that are here, and return it as it is spelled on disk: as before where a model has it
        already. That model goes, and the blobs that only it had; young ones stay for `prune`, as another who makes a
        model of this name may be about to name them.

        Raises UserError: a blob that is not here whole, a disk that does not take the manifest.
        """
        with writing(self.root), locked(self.root):
            for each in manifest.blobs:
                if not self.blobs.has(each):
                    raise UserError(f"{name} lacks the blob {each.file_name}", hint="get the model again")
            path = self._path(name) or self._manifests.joinpath(*name.parts)
            old = self._manifest(path)
            self.blobs.put_whole(path, manifest.raw)
            self._drop(old, YOUNG_S)
            return Name(*path.parts[-4:])

    def remove(self, name: Name) -> Name | None:
        """Forget a model and remove the blobs that no other one has. Its name as it was spelled; None if it is not
        here. Raises UserError."""
        if self._path(name) is None:
            return None
        with writing(self.root), locked(self.root):
            path = self._path(name)
            if path is None:
                return None
            old = self._manifest(path)
            path.unlink()
            sync_folder(path.parent)
            for folder in list(path.parents)[:3]:
                with suppress(OSError):  # other models are in it
                    folder.rmdir()
            self._drop(old)
            return Name(*path.parts[-4:])

    def copy(self, model: Stored, name: Name) -> Name:
        """Give a model another name here, from whichever store it is. Raises UserError."""
        for each in model.manifest.blobs:
            self.blobs.take(model.blobs.path(each), each)
        return self.write(name, model.manifest)

    def prune(self, older_s: float = 3600.0) -> int:
        """Remove blobs that no manifest names and that were written so long ago: what a stopped upload or `create` left
        behind. Returns how many. While a manifest cannot be read, none. Raises UserError."""
        with writing(self.root), locked(self.root):
            models, broken = self.models()
            used = {each.file_name for model in models for each in model.manifest.blobs}
            names = [] if broken else [name for name in _entries(self.blobs.folder) if _BLOB.fullmatch(name)]
            old = [
                self.blobs.folder / name
                for name in names
                if name not in used and time.time() - os.lstat(self.blobs.folder / name).st_mtime > older_s
            ]
            for path in old:
                path.unlink()
            return len(old)

    def _manifest(self, path: Path) -> Manifest | None:
        with suppress(UserError):
            return self._opened(path, Name(*path.parts[-4:])).manifest
        return None

    def _drop(self, manifest: Manifest | None, older_s: float = 0.0) -> None:
        """Remove the blobs of a manifest that is no longer here, but for those of others. Where another manifest cannot
        be read, none: it may need them."""
        models, broken = self.models()
        if manifest is None or broken:
            return
        used = {each.file_name for model in models for each in model.manifest.blobs}
        for each in manifest.blobs:
            if each.file_name not in used and self._age_s(each) >= older_s:
                self.blobs.remove(each)

    def _age_s(self, layer: Layer) -> float:
        try:
            return time.time() - os.lstat(self.blobs.path(layer)).st_mtime
        except FileNotFoundError:
            return 0.0


def _spelled(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Files below a folder whose path is `parts`, whatever its case; the same spelling first."""
    for name in sorted(_entries(folder), key=lambda name: (name != parts[0], name)):
        if name.lower() == parts[0].lower():
            yield from _spelled(folder / name, parts[1:]) if parts[1:] else [folder / name]


def _below(folder: Path, depth: int) -> Iterator[Path]:
    for name in sorted(_entries(folder)):
        yield from _below(folder / name, depth - 1) if depth > 1 else [folder / name]


def _entries(folder: Path) -> list[str]:
    """Names in a folder, without those that begin with a dot; none where it may not be read."""
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError:
        return []
