"""What is named beside a checkpoint that does not hold all it needs, told apart by what its own files say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pumice.checkpoints.fields import read_json
from pumice.checkpoints.gguf_file import is_gguf
from pumice.errors import UserError

TOWER_TYPES = ("clip", "clip_vision_model")
"""model_type of a CLIP folder."""


@dataclass(frozen=True)
class Companions:
    base: Path | None = None
    """The language model under an adapter or a lone projector."""
    tower: Path | None = None
    """A CLIP model."""
    projector: Path | None = None
    """A GGUF file with the eyes of a language model."""
    alone: bool = False
    """Are paths in a config not followed?"""


def companions(paths: Sequence[Path], *, alone: bool = False) -> Companions:
    """Raises UserError when one is no checkpoint, or two are of a kind."""
    found: dict[str, Any] = {"alone": alone}
    for path in paths:
        kind = _kind(path)
        if kind in found:
            raise UserError(
                f"{found[kind]} and {path} are both a {kind}", hint="name at most one of each kind beside a checkpoint"
            )
        found[kind] = path
    return Companions(**found)


def _kind(path: Path) -> str:
    if is_gguf(path):
        return "projector"
    return "tower" if read_json(path / "config.json").raw("model_type") in TOWER_TYPES else "base"
