"""From any format to any other that can hold the model: reads one, writes the other, and says what was done."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from pumice.checkpoints.fields import reading
from pumice.checkpoints.form import COMPUTED, Checkpoint
from pumice.checkpoints.gguf_eyes import read_eyes
from pumice.checkpoints.origin import Origin, small_files
from pumice.checkpoints.report import Progress, Report
from pumice.checkpoints.tensors import open_weights
from pumice.checkpoints.to_gguf import Types, write_eyes, write_pair
from pumice.checkpoints.to_hf import write_folder
from pumice.checkpoints.to_original import write_original
from pumice.errors import UserError


def _silent(name: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Target:
    """What is to be written. `types` is for GGUF, `dtype` and `format` for a folder: Hugging Face's without one.
    `force` replaces what is there."""

    path: Path
    types: Types = field(default_factory=Types)
    dtype: torch.dtype | None = None
    format: Literal["hf", "original"] | None = None
    force: bool = False


def write(checkpoint: Checkpoint, target: Target, progress: Progress = _silent) -> Report:
    """A path that ends in .gguf becomes a file, with its projector beside it; any other a folder.

    One tensor at a time is in memory. Raises UserError: see `to_gguf.write_pair`, `to_hf.write_folder` and
    `to_original.write_original`.
    """
    _refuse_itself(target.path, checkpoint.path, checkpoint.home, checkpoint.projector)
    origin, left = _origin(checkpoint)
    if target.path.suffix.lower() == ".gguf":
        if target.dtype is not None:
            raise UserError(
                f"{target.path} is a GGUF, and a dtype came", hint="name its type with --quant: F32, F16, BF16"
            )
        if target.format is not None:
            raise UserError(f"{target.path} is a GGUF, and the format of a folder came", hint="leave --format out")
        report = write_pair(checkpoint, target.path, target.types, origin, force=target.force, progress=progress)
    else:
        if target.types != Types():
            raise UserError(
                f"{target.path} does not end in .gguf, and only a GGUF file holds quantised weights",
                hint="name DST something.gguf, or choose the type of a folder with --dtype",
            )
        writer = write_original if target.format == "original" else write_folder
        report = writer(checkpoint, target.path, target.dtype, origin, force=target.force, progress=progress)
    return replace(report, left_out=(*report.left_out, *left))


def write_projector(source: Path, target: Target, progress: Progress = _silent) -> Report:
    """A projector file alone in other types. Raises UserError: see `read_eyes` and `to_gguf.write_eyes`."""
    with reading(source):
        eyes = read_eyes(source)
    _refuse_itself(target.path, source)
    return write_eyes(eyes, target.path, target.types, force=target.force, progress=progress)


def _refuse_itself(path: Path, *sources: Path | None) -> None:
    """Raises UserError where writing would remove a source: it is the destination, or lies in it."""
    for source in sources:
        if source is not None and path.resolve() in (source.resolve(), *source.resolve().parents) and path.exists():
            raise UserError(f"the source is {path} itself, or in it", hint="name another place for the result")


def _origin(checkpoint: Checkpoint) -> tuple[Origin | None, list[tuple[str, str]]]:
    """What the result is to remember of the source; and what of the source is not in the result."""
    if checkpoint.format == "gguf":
        return checkpoint.origin, []
    files, left = small_files(checkpoint.path)
    if checkpoint.home is not None and checkpoint.home != checkpoint.path:
        beside, more = small_files(checkpoint.home)
        # Of an adapter: what it says itself counts, and the tokenizer is the base model's.
        files, left = {**beside, **files}, [*left, *more]
    for key in open_weights(checkpoint.path):
        if key.endswith(COMPUTED):
            left.append((key, "computed from the config"))
    return Origin(checkpoint.format, files), left
