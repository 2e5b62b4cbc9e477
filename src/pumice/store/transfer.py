"""Models from a registry into the own store, and back. What is under way is told in Ollama's words and order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from pumice.errors import UserError
from pumice.store.download import Patience, fetch, on_disk, seal, tidy
from pumice.store.installed import Stored
from pumice.store.layout import OwnStore, Store
from pumice.store.link import Reach, Unreachable
from pumice.store.manifest import Layer
from pumice.store.names import Name
from pumice.store.registry import Registry

USUAL = Patience()


@dataclass(frozen=True)
class Progress:
    """One line of what is under way; with a digest it is about one file, `completed` of `total` bytes are there."""

    status: str
    digest: str | None = None
    total: int | None = None
    completed: int | None = None


@dataclass(frozen=True)
class Shelves:
    """Where a pulled model goes, and the stores of others, whose files need not come again."""

    own: OwnStore
    others: Sequence[Store] = ()

    def find(self, name: Name) -> Stored | None:
        """A model that is here whole."""
        for store in (self.own, *self.others):
            found = store.find(name)
            if found and all(store.blobs.has(each) for each in found.manifest.blobs):
                return found
        return None

    def has(self, layer: Layer) -> bool:
        """Is a file in the own store, perhaps by now? A damaged text is thrown away, to come again."""
        with on_disk():
            self.own.blobs.remove_damaged(layer)
        for store in self.others:
            if not self.own.blobs.has(layer) and store.blobs.has(layer):
                # One that is damaged there comes from the registry.
                with suppress(UserError):
                    self.own.blobs.take(store.blobs.path(layer), layer)
        return self.own.blobs.has(layer)


def pull(name: Name, shelves: Shelves, reach: Reach, patience: Patience = USUAL) -> Iterator[Progress]:
    """Bring a model into the own store: its files, verified, and then its manifest, with the bytes that came.

    Closing the iterator, or killing the process, leaves what has come for the next pull. With no registry in reach a
    model that is here whole is a success too. Raises UserError, Missing where the registry has no such model.
    """
    yield Progress("pulling manifest")
    blobs, fetched = shelves.own.blobs, []
    with Registry(name, reach) as registry:
        try:
            manifest = registry.manifest()
        except Unreachable:
            here = shelves.find(name)
            if here is None:
                raise
            for layer in here.manifest.blobs:
                yield Progress(f"pulling {layer.digest[7:19]}", layer.digest, layer.size, layer.size)
            yield Progress("success")
            return
        for layer in manifest.blobs:
            status = f"pulling {layer.digest[7:19]}"
            if shelves.has(layer):
                tidy(blobs, layer)
                yield Progress(status, layer.digest, layer.size, layer.size)
                continue
            yield Progress(status, layer.digest, layer.size)
            fetched.append(layer)
            for completed in fetch(blobs, layer, partial(registry.blob, layer), patience):
                yield Progress(status, layer.digest, layer.size, completed)
    yield Progress("verifying sha256 digest")
    for layer in fetched:
        seal(blobs, layer)
    yield Progress("writing manifest")
    shelves.own.write(name, manifest)
    yield Progress("removing unused layers")
    yield Progress("success")


def push(stored: Stored, name: Name, reach: Reach) -> Iterator[Progress]:
    """Give a model of this machine to a registry under a name: the files that it lacks, then the manifest, with the
    bytes that it has here. Raises UserError."""
    yield Progress("retrieving manifest")
    for layer in stored.manifest.blobs:
        if not stored.blobs.has(layer):
            raise UserError(f"{stored.title} is not here whole: {layer.digest[:19]}… is missing", hint="pull it again")
    with Registry(name, reach) as registry:
        for layer in dict.fromkeys(stored.manifest.blobs):
            status = f"pushing {layer.digest[7:19]}"
            yield Progress(status, layer.digest, layer.size)
            if not registry.has(layer):
                for completed in registry.upload(layer, stored.blobs.path(layer)):
                    yield Progress(status, layer.digest, layer.size, completed)
            yield Progress(status, layer.digest, layer.size, layer.size)
        yield Progress("pushing manifest")
        registry.put_manifest(stored.manifest)
    yield Progress("success")
