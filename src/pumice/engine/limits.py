"""What an engine may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pumice.errors import UserError


@dataclass(frozen=True)
class Limits:
    """What an engine may take.

    cache_bytes: keys and values, of rows that run and of those that may be asked about again; one row of the model's
    whole length always fits. feature_bytes: features of images. rows: so many requests run at a time. chunk: so many
    positions of a prompt are read in a step, while other rows gain tokens; alone_chunk: while none does. tiles: so many
    tiles of images are encoded in a step, while other rows gain tokens; alone_tiles: while none does, and always on a
    CUDA device, where these rows do not wait. drafts: so many tokens of a row's own text are tried at once at most, as
    those that may come next; 0 tries none. cache_dir: where what is known of images is written to, and found again by a
    later process; None writes nothing. disk_bytes: what that folder may take. deterministic: in types narrower than
    float32, too, an answer is the same whatever runs beside it and was asked before; passes are cut into small ones of
    equal size, which takes longer (docs/engine.md).
    """

    cache_bytes: int = 2 * 2**30
    feature_bytes: int = 2**28
    rows: int = 64
    chunk: int = 64
    alone_chunk: int = 1024
    tiles: int = 1
    alone_tiles: int = 8
    drafts: int = 16
    cache_dir: Path | None = None
    disk_bytes: int = 32 * 2**30
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for what is no such number."""
        for name, value in vars(self).items():
            if name in ("cache_dir", "deterministic"):
                continue
            least = 0 if name.endswith("bytes") or name == "drafts" else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
                raise UserError(f"{name} is {value!r:.100}", hint=f"give a whole number from {least}")
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", Path(self.cache_dir))

    def tiles_of(self, decoding: bool) -> int:
        """Tiles that are encoded at a time."""
        return 1 if self.deterministic else self.tiles if decoding else self.alone_tiles
