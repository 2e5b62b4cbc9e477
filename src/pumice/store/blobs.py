"""Files that are named by the digest of their bytes: `blobs/sha256-HEX`.

A blob appears whole, verified and on the disk, or not at all. A symlink at a blob's name is no blob: it is never
followed, and put out of the way when the blob is written. What is being written has a dotted name and is held by a lock
of its own, which ends with its process, so that leavings can be told from work.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO

from pumice.errors import UserError
from pumice.store.manifest import Layer

STRETCH = 2**20
"""Bytes read at once."""
SMALL_BYTES = 4 * 2**20
"""Up to here a blob is a text, and checked wherever it is counted on."""
PATIENCE_S = 60
_READ_ONLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK: to open a pipe would wait for its writer."""


def open_regular(path: Path) -> IO[bytes]:
    """A file to read, which is no symlink, pipe or device. Raises OSError."""
    file = os.open(path, _READ_ONLY)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(0, "it is no regular file", str(path))
    return os.fdopen(file, "rb")


def chunks(file: IO[bytes]) -> Iterator[bytes]:
    """The rest of a file, in stretches."""
    while data := file.read(STRETCH):
        yield data


def told(files: Iterable[IO[bytes]]) -> str:
    """The SHA-256 of the rest of some files, one behind the other, in hexadecimal digits."""
    found = hashlib.sha256()
    for file in files:
        for data in chunks(file):
            found.update(data)
    return found.hexdigest()


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """The folder of a store, for this thread of this process alone. Held for moments, never for the length of a copy.

    Raises OSError, and UserError where another one holds it for longer than any of them needs.
    """
    root.mkdir(parents=True, exist_ok=True)
    file = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        until = time.monotonic() + PATIENCE_S
        while not _taken(file):
            if time.monotonic() > until:
                raise UserError(f"another process has been changing {root} for {PATIENCE_S} s", hint="wait, or end it")
            time.sleep(0.01)
        yield
    finally:
        os.close(file)


def _taken(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turns what the system says about a place that does not take bytes into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{place} cannot be written: {error.strerror or error}", hint="check the disk's free space and the folder"
        ) from error


def sync_folder(folder: Path) -> None:
    """The names in a folder, onto the disk. Raises OSError."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


class Blobs:
    """The blobs of one store, whose folder is `root`."""

    def __init__(self, root: Path) -> None:
        self._root, self.folder = root, root / "blobs"

    def path(self, layer: Layer) -> Path:
        """Where the blob is, or would be."""
        return self.folder / layer.file_name

    def has(self, layer: Layer) -> bool:
        """Is the blob here, of the layer's size? Its bytes are not looked at."""
        try:
            found = os.lstat(self.path(layer))
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == layer.size

    def sound(self, layer: Layer) -> bool:
        """Is the blob here, and where it is small with the bytes that its name says? Weights are not read."""
        if layer.size > SMALL_BYTES:
            return self.has(layer)
        try:
            self.read(layer, SMALL_BYTES)
        except UserError:
            return False
        return True

    def read(self, layer: Layer, most: int) -> bytes:
        """The bytes of a small blob, verified. Raises UserError for one that is missing, damaged or beyond `most`."""
        if layer.size > most:
            raise _damaged(layer, f"has {layer.size} bytes, of which {most} are read")
        try:
            with open_regular(self.path(layer)) as file:
                data = file.read(layer.size + 1)
        except OSError as error:
            raise _damaged(layer, f"cannot be read: {error.strerror or error}") from error
        if len(data) != layer.size or f"sha256:{hashlib.sha256(data).hexdigest()}" != layer.digest:
            raise _damaged(layer, "has other bytes than its name says")
        return data

    def put(self, data: Iterable[bytes], media_type: str, *, digest: str | None = None) -> Layer:
        """Write a blob and return its layer; a `sound` blob that is here already stays as it is. digest: what it must
        be.

        Raises UserError: other bytes than those of the digest, a disk that does not take them. Then no blob is there.
        """
        with self.arriving(digest) as arrival:
            for each in data:
                arrival.write(each)
        return Layer(media_type, arrival.digest, arrival.size)

    @contextmanager
    def arriving(self, digest: str | None = None) -> Iterator[Arrival]:
        """A blob whose bytes come piece by piece, as an upload's: `write` each. It is there when the block has ended
        well, and not at all when it has not. Raises as `put` does, a wrong digest at the end of the block."""
        with writing(self.folder), locked(self._root):
            part, file = self._begin()
        try:
            with file:
                arrival = Arrival(file, self.folder)
                yield arrival
                if digest not in (None, arrival.digest):
                    raise UserError(
                        f'digest mismatch, expected "{digest}", got "{arrival.digest}"',
                        hint="the file must be sent or fetched again",
                    )
                layer = Layer("", arrival.digest, arrival.size)
                if not self.sound(layer):
                    with writing(self.folder):
                        _settle(file, part, self.path(layer))
        finally:
            part.unlink(missing_ok=True)

    def held(self, digest: str) -> Layer | None:
        """The layer of a blob that is here, without a media type. digest: `sha256:` and 64 digits of 0-9 and a-f."""
        layer = Layer("", digest, 0)
        try:
            found = os.lstat(self.path(layer))
        except OSError:
            return None
        return Layer("", digest, found.st_size) if stat.S_ISREG(found.st_mode) else None

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """A folder of this writer's own, on the disk of the blobs. It goes at the end of the block; of a writer that is
        killed, when the next one comes. Raises UserError."""
        holding = ExitStack()
        with writing(self.folder), locked(self._root):
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.glob(".*.work"):
                with suppress(OSError), _held_folder(old):
                    shutil.rmtree(old, ignore_errors=True)
            folder = self.folder / f".{secrets.token_hex(8)}.work"
            folder.mkdir(mode=0o700)
            holding.enter_context(_held_folder(folder))
        with holding:
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def keep(self, path: Path, media_type: str) -> Layer:
        """A file of a `workshop` as a blob: it moves. Raises UserError."""
        with writing(self.folder), FileIO(path, "r") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            layer = Layer(media_type, f"sha256:{found}", os.fstat(file.fileno()).st_size)
            if not self.sound(layer):
                _settle(file, path, self.path(layer))
        return layer

    def put_whole(self, path: Path, data: bytes) -> None:
        """A small file that is no blob, whole or not at all. The store must be `locked`. Raises OSError."""
        part, file = self._begin()
        try:
            with file:
                _write(file, data)
                path.parent.mkdir(parents=True, exist_ok=True)
                _settle(file, part, path)
        finally:
            part.unlink(missing_ok=True)

    def take(self, path: Path, layer: Layer) -> None:
        """A file of this disk as a blob: a second name of it where the system allows one, else a copy. The file itself
        stays as it is.

        Raises UserError as `put` does, and where the file's bytes are not the layer's.
        """
        if self.has(layer):
            return
        try:
            with open_regular(path) as file:
                if f"sha256:{told([file])}" != layer.digest:
                    raise _damaged(layer, "has other bytes than its name says")
                with suppress(OSError):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    os.link(path, self.path(layer), follow_symlinks=False)
                    sync_folder(self.folder)
                    return
                file.seek(0)
                self.put(chunks(file), layer.media_type, digest=layer.digest)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{path} cannot be read: {why}", hint="check who may read it") from error

    def remove(self, layer: Layer) -> None:
        """Raises OSError."""
        self.path(layer).unlink(missing_ok=True)

    def remove_damaged(self, layer: Layer) -> None:
        """Make room for a blob that is here with other bytes than its name says. Raises OSError, UserError."""
        if self.has(layer) and not self.sound(layer):
            with locked(self._root):
                # Another process may have put it right by now.
                if self.has(layer) and not self.sound(layer):
                    self.remove(layer)

    def _begin(self) -> tuple[Path, FileIO]:
        """A new file for its owner alone, held by a lock. The store must be locked: so no file is seen before it is
        held, and what is not held was left by a writer that is gone, and goes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(".*.part"):
            with suppress(OSError), open_regular(old) as leaving:
                fcntl.flock(leaving, fcntl.LOCK_EX | fcntl.LOCK_NB)
                old.unlink(missing_ok=True)
        part = self.folder / f".{secrets.token_hex(8)}.part"
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        return part, FileIO(file, "w")


class Arrival:
    """What has come of a blob."""

    def __init__(self, file: FileIO, folder: Path) -> None:
        self._file, self._folder, self._found, self.size = file, folder, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        """Raises UserError where the disk does not take it."""
        with writing(self._folder):
            _write(self._file, data)
        self._found.update(data)
        self.size += len(data)

    @property
    def digest(self) -> str:
        return f"sha256:{self._found.hexdigest()}"


@contextmanager
def _held_folder(folder: Path) -> Iterator[None]:
    """A folder under a lock that ends with the process. Raises OSError where another one has it."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


def _write(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _settle(file: FileIO, part: Path, path: Path) -> None:
    """All bytes onto the disk, for everybody to read, as Ollama has it, and under their name."""
    os.fchmod(file.fileno(), 0o644)
    os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def _damaged(layer: Layer, why: str) -> UserError:
    return UserError(f"the blob {layer.file_name} {why}", hint="the store is damaged; get the model again")
