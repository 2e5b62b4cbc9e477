"""What a conversion did: what it wrote, what it left out, and what differs where the new format is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[str, int, int], None]
"""Called with the name of a tensor that has been written, the bytes written so far and those of the whole."""


@dataclass(frozen=True)
class Written:
    """A file, or a folder of shards."""

    path: Path
    tensors: int
    kinds: Mapping[str, int]
    """How many tensors of each type: `{"Q4_K": 193, "F32": 65}`."""
    nbytes: int
    """Of the tensors."""


@dataclass(frozen=True)
class Report:
    """The result of `pumice.convert`."""

    written: tuple[Written, ...]
    left_out: tuple[tuple[str, str], ...]
    """What the source has and the result has not, each with the reason."""
    notes: tuple[str, ...]
    """What else a user of the result should know."""

    def __str__(self) -> str:
        lines = []
        for each in self.written:
            kinds = ", ".join(f"{name} {count}" for name, count in each.kinds.items())
            lines.append(f"wrote {each.path}: {each.tensors} tensors ({kinds}), {_size(each.nbytes)}")
        lines += [f"left out {what}: {why}" for what, why in self.left_out]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
