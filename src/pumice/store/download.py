"""The one downloader: a blob of known size and sha256, in parts of which several come at once, into a folder of blobs
by way of its partial file (partial.py)."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pumice.errors import UserError, shortened
from pumice.store.blobs import Blobs, sync_folder
from pumice.store.link import Answer, Unreachable
from pumice.store.manifest import Layer
from pumice.store.partial import MB, Part, Partial

STREAMS = 8
"""How many parts come at once."""
KEPT_EVERY = 4 * MB
"""After how many bytes a part's file is written anew: what a killed process loses of a part at most."""
TOLD_EVERY_S = 0.06
"""Seconds between two reports, as Ollama's."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ELSEWHERE = "ask another registry, or its owner"
_ROOM_HINT = "make room and try again; what came is kept"

Ask = Callable[[dict[str, str]], AbstractContextManager[Answer]]
"""Requests the blob with these headers more. Raises Unreachable where another try may help, UserError where not."""


class _Broken(UserError):
    """What comes is not what was declared."""


class _NoRanges(Exception):
    """The server sends the whole blob when it is asked for a part."""


@dataclass(frozen=True)
class Patience:
    """What a part does when its bytes stop coming: a try after 1, 2, 4… times `wait_s` seconds, `tries` times. Bytes
    that came since begin the count anew."""

    tries: int = 6
    wait_s: float = 1.0


def fetch(blobs: Blobs, layer: Layer, ask: Ask, patience: Patience) -> Iterator[int]:
    """Bring all bytes of a blob into its partial file; yields how many are there, some times a second. `seal` makes it
    a blob.

    Whoever else brings the same blob is waited for. Closing the iterator ends the transfer and keeps what came.
    Raises UserError: the server gave up or sent what was not declared, or the disk is full.
    """
    with on_disk():
        blobs.folder.mkdir(parents=True, exist_ok=True)
        partial = Partial(blobs.path(layer), layer.size)
        with partial.locked() as handle:
            while handle.wait():
                yield partial.completed()
            if blobs.has(layer):
                partial.forget()
                yield layer.size
                return
            partial.open(handle.descriptor)
            _refuse_full(blobs.folder, layer.size - partial.completed())
            try:
                try:
                    yield from _Transfer(partial, ask, patience).run()
                except _NoRanges:
                    partial.lay_out(layer.size)
                    yield from _Transfer(partial, ask, patience).run()
            except _Broken:
                partial.remove()
                raise


def tidy(blobs: Blobs, layer: Layer) -> None:
    """Remove what a process left behind that was killed when it had just made this blob."""
    with on_disk():
        Partial(blobs.path(layer), layer.size).forget()


def seal(blobs: Blobs, layer: Layer) -> None:
    """Check the sha256 of a partial file that is complete, and make it the blob.

    Raises UserError where it is another: then the file is deleted, and what is known of it.
    """
    with on_disk():
        partial = Partial(blobs.path(layer), layer.size)
        with partial.locked() as handle:
            while handle.wait():
                pass
            if blobs.has(layer):
                partial.forget()
                return
            with os.fdopen(os.dup(handle.descriptor), "rb") as file:
                file.seek(0)
                found = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            if found != layer.digest:
                partial.remove()
                raise UserError(
                    f"digest mismatch, file must be downloaded again: want {layer.digest}, got {found}",
                    hint="try again; where it happens again, the registry's file is broken",
                )
            os.fsync(handle.descriptor)
            os.replace(partial.path, blobs.path(layer))
            sync_folder(blobs.folder)
            partial.forget()


class _Transfer:
    """The parts of a blob on their way, each by one of a few threads."""

    def __init__(self, partial: Partial, ask: Ask, patience: Patience) -> None:
        self._partial, self._ask, self._patience = partial, ask, patience
        self._waiting = deque(part for part in partial.parts if part.left)
        self._stop, self._news = threading.Event(), threading.Event()
        self._problems: list[Exception] = []
        self._live: set[Answer] = set()

    def run(self) -> Iterator[int]:
        """Yields how many bytes are there; ends the threads when it is closed."""
        workers = []
        try:
            for _ in range(min(STREAMS, len(self._waiting))):
                # Each has the file open for itself, and with it the lock, until it is done with it.
                descriptor = os.dup(self._partial.descriptor)
                worker = threading.Thread(target=self._work, args=(descriptor,), daemon=True)
                workers.append(worker)
                worker.start()
            while any(each.is_alive() for each in workers):
                yield sum(each.Completed for each in self._partial.parts)
                self._news.wait(TOLD_EVERY_S)
                self._news.clear()
        finally:
            self._stop.set()
            for answer in list(self._live):
                answer.hang_up()
            for each in workers:
                each.join(timeout=2.0)
        if self._problems:
            raise self._problems[0]
        assert not any(each.left for each in self._partial.parts)
        yield self._partial.size

    def _work(self, descriptor: int) -> None:
        try:
            while not self._stop.is_set():
                try:
                    part = self._waiting.popleft()
                except IndexError:
                    return
                self._bring(part, descriptor)
        except (UserError, OSError, _NoRanges) as error:
            if not self._stop.is_set():
                self._problems.append(error)
            self._stop.set()
        finally:
            os.close(descriptor)
            self._news.set()

    def _bring(self, part: Part, descriptor: int) -> None:
        """All bytes of a part, by as many tries as it takes while they bring something."""
        tries = 0
        while part.left:
            before = part.Completed
            try:
                self._stream(part, descriptor)
                if part.left:
                    raise Unreachable("the transfer broke off", hint="try again; what came is kept")
            except Unreachable:
                tries = 0 if part.Completed > before else tries + 1
                if tries >= self._patience.tries:
                    raise
                if self._stop.wait(self._patience.wait_s * 2 ** max(tries - 1, 0)):
                    return

    def _stream(self, part: Part, descriptor: int) -> None:
        """One request, and the bytes that it brings."""
        whole = part.Completed == 0 and part.Size == self._partial.size
        headers = {} if whole else {"Range": f"bytes={part.at}-{part.Offset + part.Size - 1}"}
        with self._ask(headers) as answer, self._live_while(answer):
            self._check(answer, part, whole)
            kept = part.Completed
            try:
                for piece in answer.pieces():
                    if self._stop.is_set():
                        return
                    if len(piece) > part.left:
                        raise _Broken("more bytes came than the manifest declares", hint=_ELSEWHERE)
                    _write(descriptor, part.at, piece)
                    part.Completed += len(piece)
                    if part.Completed - kept >= KEPT_EVERY:
                        self._partial.keep(part)
                        kept = part.Completed
            finally:
                self._partial.keep(part)

    @contextmanager
    def _live_while(self, answer: Answer) -> Iterator[None]:
        self._live.add(answer)
        try:
            yield
        finally:
            self._live.discard(answer)

    def _check(self, answer: Answer, part: Part, whole: bool) -> None:
        """Raises unless the body to come is what was asked for."""
        size, end = self._partial.size, part.Offset + part.Size - 1
        length = answer.headers.get("content-length")
        match answer.status:
            case 200 if whole:
                if length is not None and length != str(size):
                    raise _Broken(f"{length} bytes come where the manifest declares {size}", hint=_ELSEWHERE)
            case 200 if length == str(size) or len(self._partial.parts) == 1:
                raise _NoRanges
            case 206 if not whole:
                span = answer.headers.get("content-range", "")
                if span not in (f"bytes {part.at}-{end}/{size}", f"bytes {part.at}-{end}/*"):
                    raise _Broken(f"other bytes come than were asked for: {shortened(span)}", hint=_ELSEWHERE)
            # 200 of another length is not the registry's: a page of a hotel's network.
            case 200 | 408 | 425 | 429 | 500 | 502 | 503 | 504 as status:
                raise Unreachable(f"the registry answers {status}", hint="try again later; what came is kept")
            case 416:
                raise _Broken("the registry's file is shorter than its manifest declares", hint=_ELSEWHERE)
            case 404 | 410:
                raise UserError("the registry does not have a file that its manifest names", hint=_ELSEWHERE)
            case status:
                raise UserError(f"the registry answers {status} for a file", hint="check that you may have this model")


def _write(descriptor: int, at: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


def _refuse_full(folder: Path, size: int) -> None:
    if shutil.disk_usage(folder).free < size:
        raise UserError(f"the disk of the store has no room for {size / MB:.0f} MB more", hint=_ROOM_HINT)


@contextmanager
def on_disk() -> Iterator[None]:
    """What the system says of the disk, in words of ours and without its paths."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError("the disk of the store is full", hint=_ROOM_HINT) from error
        raise UserError(
            f"the store cannot be written: {error.strerror or type(error).__name__}", hint="check its folder's rights"
        ) from error
