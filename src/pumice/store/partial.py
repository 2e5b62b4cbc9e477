"""A blob that is not whole yet: its partial file, which is also the lock, and the files of its parts.

It is `sha256-HEX-partial`, a sparse file, with a `sha256-HEX-partial-N` beside it for each part that says how far that
is: Ollama's layout, so either program can go on where the other was stopped. A part's bytes are written before the
file that counts them, and such a file appears whole, so a process may be killed at any moment. Who holds the lock
writes; who waited for it looks whether the file still bears its name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

MB = 1000 * 1000
SMALLEST_PART, LARGEST_PART, PARTS = 100 * MB, 1000 * MB, 16
"""Bytes of a part, and how many parts a blob has within these bounds: Ollama's numbers."""


@dataclass
class Part:
    """A stretch of the blob, and how much of it is there, in bytes; the names are those in its file."""

    N: int
    Offset: int
    Size: int
    Completed: int = 0

    @property
    def at(self) -> int:
        return self.Offset + self.Completed

    @property
    def left(self) -> int:
        return self.Size - self.Completed


class Lock:
    """The partial file, open, and ours once `wait` says so."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.descriptor = -1
        self.held = False

    def wait(self, every_s: float = 0.25) -> bool:
        """Try to have the lock; True is not yet, after a pause."""
        if self.descriptor < 0:
            self.descriptor = _opened(self._path)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(every_s)
            return True
        mine, named = os.fstat(self.descriptor), None
        with suppress(FileNotFoundError):
            named = os.lstat(self._path)
        if named is None or (mine.st_dev, mine.st_ino) != (named.st_dev, named.st_ino):
            # Whoever had it has made it a blob, or has thrown it away.
            self.release()
            return True
        self.held = True
        return False

    def release(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor, self.held = -1, False


def _opened(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    path.unlink(missing_ok=True)  # a link stood there
    return os.open(path, flags, 0o644)


class Partial:
    """The partial file of a blob, and the files of its parts."""

    def __init__(self, path: Path, size: int) -> None:
        """Of the blob at `path`, `size` bytes long."""
        self.path, self.size = path.with_name(f"{path.name}-partial"), size
        self.parts: list[Part] = []
        self.descriptor = -1

    @contextmanager
    def locked(self) -> Iterator[Lock]:
        lock = Lock(self.path)
        try:
            yield lock
        finally:
            # A file that holds nothing and is of no use to a next try.
            if lock.held and not self._described() and os.fstat(lock.descriptor).st_size == 0:
                self.path.unlink(missing_ok=True)
            lock.release()

    def open(self, descriptor: int) -> None:
        """Read how far the parts are, or lay them out where there are none that make up the blob."""
        self.descriptor = descriptor
        size, read = self.size, self._read()
        laid_end = os.fstat(descriptor).st_size
        laid_out = [(each.N, each.Offset) for each in read] == _starts(read, size)
        if read and laid_out and all(0 <= each.Completed <= each.Size and each.at <= laid_end for each in read):
            self.parts = read
            return
        length = min(max(-(-size // PARTS), SMALLEST_PART), LARGEST_PART)
        self.lay_out(length)

    def lay_out(self, length: int) -> None:
        """Begin anew, with parts of `length` bytes."""
        size = self.size
        self.forget()
        os.ftruncate(self.descriptor, 0)
        os.ftruncate(self.descriptor, size)  # takes no room yet
        self.parts = [Part(n, at, min(length, size - at)) for n, at in enumerate(range(0, size, max(length, 1)))]
        for each in self.parts:
            self.keep(each)

    def completed(self) -> int:
        """Bytes that are there, as the files of the parts say."""
        return min(sum(each.Completed for each in self._read()), self.size)

    def keep(self, part: Part) -> None:
        """Write how far a part is, whole or not at all."""
        path = self._part_path(part)
        new = path.with_name(f"{path.name}.new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            json.dump(asdict(part), file, separators=(",", ":"))
        os.replace(new, path)

    def forget(self) -> None:
        for path in self._described():
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.forget()

    def _part_path(self, part: Part) -> Path:
        return self.path.with_name(f"{self.path.name}-{part.N}")

    def _described(self) -> list[Path]:
        return list(self.path.parent.glob(f"{self.path.name}-*"))

    def _read(self) -> list[Part]:
        found = []
        for path in self._described():
            with suppress(OSError, ValueError, TypeError, KeyError):
                raw = json.loads(path.read_bytes()) if not path.is_symlink() else {}
                numbers = [int(raw[key]) for key in ("N", "Offset", "Size", "Completed")]
                found.append(Part(*numbers))
        return sorted(found, key=lambda each: each.Offset)


def _starts(parts: list[Part], size: int) -> list[tuple[int, int]] | None:
    """Number and offset of parts of these lengths, where they make up a blob of this size."""
    starts, at = [], 0
    for number, each in enumerate(parts):
        starts.append((number, at))
        at += each.Size
    return starts if at == size else None
