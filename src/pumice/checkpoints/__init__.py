"""Checkpoints in Hugging Face's and in the LLaVA authors' format, read into one form, and written as the former.

Nothing in a checkpoint is executed: configs are data, chat templates are compared with known ones, and `.bin` files are
read by an interpreter that can only describe tensors (`pickles`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pumice.checkpoints import hf, original
from pumice.checkpoints.fields import read_json, reading
from pumice.checkpoints.form import Checkpoint, expected_tensors
from pumice.checkpoints.hf_writer import check_writable, write_hf
from pumice.checkpoints.tensors import Tensors
from pumice.errors import UserError

__all__ = ["Checkpoint", "Tensors", "check_writable", "companions", "expected_tensors", "read", "write_hf"]


def read(path: Path, *, base: Path | None = None, tower: Path | None = None, template: str | None = None) -> Checkpoint:
    """The checkpoint in a folder, its weights mapped and not yet read.

    base: the language model under a LoRA folder or a projector alone. tower: the CLIP folder of an authors' 1.5 folder,
    when it is not beside it. template: the name of a prompt template, instead of the folder's own.

    Raises UserError: a file that is missing, damaged or hostile; a model that pumice does not run, by what is different
    about it; a tensor that is missing, extra or of the wrong shape, by its name.
    """
    with reading(path):
        return _read(path, base, tower, template)


def _read(path: Path, base: Path | None, tower: Path | None, template: str | None) -> Checkpoint:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder", hint="give the folder that holds config.json and the weights")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json", hint="give a checkpoint's folder; the file says what model it is")
    config = read_json(path / "config.json")
    if original.is_original(config):
        return original.read(path, config, original.Companions(base, tower), template)
    if base is not None or tower is not None:
        raise UserError(
            f"{path} is a whole model in Hugging Face's format; {base or tower} beside it has no place",
            hint="leave it out; only the LLaVA authors' folders come in parts",
        )
    return hf.read(path, config, template)


def companions(folders: Sequence[Path]) -> tuple[Path | None, Path | None]:
    """Folders given beside a checkpoint as (base, tower), told apart by their config.json: a CLIP model is a tower.

    Raises UserError when one has no config.json, or two are of a kind.
    """
    bases: list[Path] = []
    towers: list[Path] = []
    for folder in folders:
        kind = read_json(folder / "config.json").raw("model_type")
        (towers if kind in original.TOWER_TYPES else bases).append(folder)
    for found in (bases, towers):
        if len(found) > 1:
            raise UserError(
                f"{found[0]} and {found[1]} are both {'vision towers' if found is towers else 'language models'}",
                hint="name at most one of each kind beside a checkpoint",
            )
    return next(iter(bases), None), next(iter(towers), None)
