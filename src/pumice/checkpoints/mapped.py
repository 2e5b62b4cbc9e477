"""A file as bytes in memory that are read when they are touched."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MappedFile:
    """A file, mapped when its bytes are first asked for. The mapping is private: a write to it changes no file."""

    path: Path
    size: int

    @functools.cached_property
    def bytes(self) -> Tensor:
        """The whole file, (size,) uint8."""
        storage: Any = torch.UntypedStorage.from_file(str(self.path), shared=False, nbytes=self.size)
        return torch.empty(0, dtype=torch.uint8).set_(storage)

    @property
    def memory(self) -> memoryview:
        """The same bytes, for readers that want no tensor."""
        return self.bytes.numpy().data
