"""What the cache knows of images, on a disk: files that are found by their names and believed only if they are whole.

A name is a digest of all that its numbers depend on, so there is nothing to compare. The end of a file's name is the
checksum of its tensors: a file that was cut or changed is no file.
"""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from pumice.checkpoints.safetensors_writer import Weight, put_safetensors
from pumice.checkpoints.tensors import open_file
from pumice.checkpoints.whole import sweep, whole
from pumice.errors import UserError

END = ".safetensors"


class Disk:
    """A folder of at most so many bytes; what was not used for the longest goes first. Processes may share it."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Raises UserError for a folder that cannot be made."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
        except OSError as error:
            raise UserError(
                f"the cache folder {folder} cannot be made: {error.strerror}", hint="name a folder that can be written"
            ) from error
        self._folder, self._most_bytes = folder, most_bytes
        self._writer = ThreadPoolExecutor(1, "pumice cache")
        self._writing: dict[str, Future[None]] = {}
        self._lock = threading.Lock()

    def has(self, name: str) -> bool:
        """Whether it is there, or on its way."""
        return name in self._writing or self._file(name) is not None

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of that name; None where there are none, or a file that is not whole, which is removed."""
        path = self._file(name)
        if path is None:
            return None
        try:
            found = {key: entry.dense() for key, entry in open_file(path).items()}
            if path.name != _file_name(name, {key: _check(values) for key, values in found.items()}):
                raise UserError(f"{path} is damaged", hint="it is not read")
        except (UserError, OSError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def save(self, name: str, tensors: Mapping[str, Weight], done: Callable[[], None]) -> None:
        """Written by a thread of its own, which then calls `done`. What cannot be written is left out."""

        def write() -> None:
            try:
                # A full disk or a folder that is gone is no reason to fail: it is only a cache.
                with contextlib.suppress(OSError, UserError):
                    self._write(name, tensors)
            finally:
                done()
                with self._lock:
                    del self._writing[name]

        with self._lock:
            self._writing[name] = self._writer.submit(write)

    def wait(self) -> None:
        """Until all is written."""
        for each in list(self._writing.values()):
            each.result()

    def _write(self, name: str, tensors: Mapping[str, Weight]) -> None:
        if sum(each.nbytes for each in tensors.values()) > self._most_bytes:
            return
        checks: dict[str, int] = {}

        def checked(key: str, weight: Weight) -> Weight:
            def load() -> Tensor:
                values = weight.load().to("cpu").contiguous()
                checks[key] = _check(values)
                return values

            return Weight(weight.shape, weight.dtype, load)

        path = self._folder / name
        with whole(path, replace=True) as partial:
            for _ in put_safetensors(partial, {key: checked(key, each) for key, each in tensors.items()}):
                pass
        path.replace(self._folder / _file_name(name, checks))
        self._shrink()

    def _file(self, name: str) -> Path | None:
        return next(iter(self._folder.glob(f"{name}-*{END}")), None)

    def _shrink(self) -> None:
        files = []
        for path in self._folder.glob(f"*{END}"):
            with contextlib.suppress(OSError):
                files.append((path.stat().st_mtime, path.stat().st_size, path))
        taken = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if taken <= self._most_bytes:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            taken -= size


def _check(values: Tensor) -> int:
    return zlib.crc32(values.contiguous().flatten().view(torch.uint8).numpy().data)


def _file_name(name: str, checks: Mapping[str, int]) -> str:
    return f"{name}-{zlib.crc32(repr(sorted(checks.items())).encode()):08x}{END}"
