"""`pumice.convert`: a model in one format, written in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pumice import store
from pumice.checkpoints.convert import Target, write, write_projector
from pumice.checkpoints.gguf_eyes import PROJECTOR
from pumice.checkpoints.gguf_eyes_writer import FILE_TYPES
from pumice.checkpoints.gguf_file import architecture
from pumice.checkpoints.mixes import mix
from pumice.checkpoints.report import Progress, Report
from pumice.checkpoints.to_gguf import Types
from pumice.errors import UserError, nearest
from pumice.model import DTYPES
from pumice.quant import FORMATS
from pumice.source import Source


@dataclass(frozen=True)
class Choices:
    """What a conversion seldom needs.

    dtype: float32, bfloat16 or float16, of a folder's weights; None keeps theirs, and takes float16 for what comes out
    of blocks. template: the prompt template, instead of the checkpoint's own. requantise: make blocks of blocks, at a
    second loss. force: replace what is at the destination. progress: called after each tensor. format: of a folder,
    `hf` or `original`, the LLaVA authors'; None is `hf`.
    """

    dtype: str | None = None
    template: str | None = None
    requantise: bool = False
    force: bool = False
    progress: Progress | None = None
    format: Literal["hf", "original"] | None = None


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    quant: str | None = None,
    vision: str | None = None,
    beside: str | Path | Sequence[str | Path] = (),
    choices: Choices | None = None,
) -> Report:
    """Write the model `src` as `dst`: a GGUF file if that ends in .gguf, with `mmproj-NAME` beside it for a LLaVA, a
    folder otherwise, Hugging Face's or the authors'. It appears whole or not at all; one tensor at a time is in memory.

    src: what `pumice.load` takes. quant: a mix of llama.cpp's (`Q4_K_M`, `Q8_0`, …) or `F16`, `BF16`, `F32`; None keeps
    each weight's type. vision: `f16`, `q8_0`, `f32` or `bf16` for tower and projector; None takes f16 beside a quant.
    beside: as for `pumice.load`.

    A projector file (mmproj) alone becomes another one, of the type `vision` or `quant`.

    Raises UserError: what `pumice.load` raises; a destination that is there already; a model or a choice that the
    destination's format cannot hold; a full disk.
    """
    chosen = choices or Choices()
    if chosen.dtype is not None and chosen.dtype not in DTYPES:
        raise UserError(f"dtype is {chosen.dtype!r}", hint=nearest(chosen.dtype, DTYPES))
    if chosen.format not in (None, "hf", "original"):
        raise UserError(f"format is {chosen.format!r}", hint="give hf or original")
    if vision is not None and vision.upper() not in FILE_TYPES:
        raise UserError(f"vision is {vision!r}", hint=f"one of {', '.join(each.lower() for each in FILE_TYPES)}")
    folders = (beside,) if isinstance(beside, str | Path) else tuple(beside)
    if is_projector(src):
        return _projector(store.resolve(src), Path(dst).expanduser(), quant, vision, folders, chosen)
    types = Types(mix(quant) if quant else None, FORMATS[vision.upper()] if vision else None, chosen.requantise)
    checkpoint = Source(src, chosen.template, beside=folders).checkpoint()
    dtype = DTYPES[chosen.dtype] if chosen.dtype else None
    target = Target(Path(dst).expanduser(), types, dtype, chosen.format, chosen.force)
    return write(checkpoint, target, *([chosen.progress] if chosen.progress else []))


def _projector(
    src: Path, dst: Path, quant: str | None, vision: str | None, beside: Sequence[str | Path], chosen: Choices
) -> Report:
    others = {"beside": beside, "dtype": chosen.dtype, "template": chosen.template, "format": chosen.format}
    for what, value in others.items():
        if value:
            raise UserError(f"{src} is a projector file alone, and {what} came", hint="leave it out")
    if dst.suffix.lower() != ".gguf":
        raise UserError(f"{src} is a projector file alone, {dst} no .gguf", hint="name DST mmproj-something.gguf")
    names = {each.upper() for each in (quant, vision) if each}
    if len(names) != 1 or not names <= FILE_TYPES.keys():
        came = " and ".join(sorted(names)) or "no type"
        raise UserError(
            f"{src} is a projector file alone, and {came} came", hint=f"give one type of {', '.join(FILE_TYPES)}"
        )
    target = Target(dst, Types(eyes=FORMATS[names.pop()], again=chosen.requantise), force=chosen.force)
    return write_projector(src, target, *([chosen.progress] if chosen.progress else []))


def is_projector(src: str | Path) -> bool:
    """Is this the file of a projector (mmproj)? Raises UserError for a name that leads nowhere."""
    return architecture(store.resolve(src)) == PROJECTOR
