"""A file as bytes in memory that are read when they are touched."""

from __future__ import annotations

import contextlib
import functools
import mmap
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class MappedFile:
    """A file, mapped when its bytes are first asked for. The mapping is private: a write to it changes no file."""

    path: Path
    size: int

    @functools.cached_property
    def _mapping(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)
        if sys.platform == "linux":
            # What is not in memory yet is read in large pages where the file system has them, which are found sooner.
            with contextlib.suppress(OSError):
                mapping.madvise(mmap.MADV_HUGEPAGE)
        return mapping

    @functools.cached_property
    def bytes(self) -> Tensor:
        """The whole file, (size,) uint8."""
        return torch.frombuffer(self._mapping, dtype=torch.uint8)

    @property
    def memory(self) -> memoryview:
        """The same bytes, for readers that want no tensor."""
        return memoryview(self._mapping)

    def give_back(self, start: int, size: int) -> None:
        """The pages that lie in this stretch as a whole leave the process's memory; they are read again when they are
        touched again. What was written to them is lost."""
        first, last = -(-start // mmap.PAGESIZE), (start + size) // mmap.PAGESIZE
        if sys.platform == "linux" and first < last:
            self._mapping.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)
