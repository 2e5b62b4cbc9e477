"""Checkpoints in Hugging Face's, the LLaVA authors' and GGUF's format, read into one form; `convert` writes them.

Nothing in a checkpoint is executed: configs are data, chat templates are compared with known ones, and `.bin` files are
read by an interpreter that can only describe tensors (`pickles`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pumice.checkpoints import gguf, hf, original
from pumice.checkpoints.companions import Companions, companions
from pumice.checkpoints.fields import read_json, reading
from pumice.checkpoints.form import Checkpoint, expected_tensors
from pumice.checkpoints.gguf_file import is_gguf
from pumice.checkpoints.hf_writer import check_writable, write_hf
from pumice.checkpoints.tensors import Tensors
from pumice.errors import UserError

__all__ = ["Checkpoint", "Tensors", "check_writable", "expected_tensors", "read", "write_hf"]


def read(
    path: Path,
    *,
    beside: Sequence[Path] = (),
    template: str | None = None,
    alone: bool = False,
    worded: bool = False,
) -> Checkpoint:
    """The checkpoint in a folder or a GGUF file, its weights mapped and not yet read.

    beside: what else it needs, each known by what its own files say: the language model under a LoRA folder or a lone
    projector, the CLIP folder of an authors' 1.5 folder, the projector file (mmproj) of a GGUF, where it is not in the
    same folder. template: the name of a prompt template, instead of the checkpoint's own.

    alone: a path in a config is not followed, as in files that somebody sent: what it leads to is not theirs. worded:
    of a GGUF, its prompts are made by a template that lies beside it in a store; its own need not be one that is known.

    Raises UserError: a file that is missing, damaged or hostile; a model that pumice does not run, by what is different
    about it; a tensor that is missing, extra or of the wrong shape, by its name.
    """
    with reading(path):
        return _read(path, companions(beside, alone=alone), template, worded)


def _read(path: Path, beside: Companions, template: str | None, worded: bool) -> Checkpoint:
    if is_gguf(path):
        _refuse(path, "a GGUF file", beside.base, beside.tower)
        return gguf.read(path, beside.projector, template, worded=worded)
    if not path.is_dir():
        raise UserError(f"{path} is no folder and no GGUF file", hint="give a checkpoint's folder or a .gguf file")
    if not (path / "config.json").is_file():
        near = min((str(each) for each in path.glob("*.gguf")), default=None)
        what = (
            f"name a file in it, such as {near}"
            if near
            else "give a checkpoint's folder; the file says what model it is"
        )
        raise UserError(f"{path} has no config.json", hint=what)
    config = read_json(path / "config.json")
    if original.is_original(config):
        _refuse(path, "a folder of the LLaVA authors", beside.projector)
        return original.read(path, config, beside, template)
    _refuse(path, "a whole model in Hugging Face's format", beside.base, beside.tower, beside.projector)
    return hf.read(path, config, template)


def _refuse(path: Path, what: str, *beside: Path | None) -> None:
    for each in beside:
        if each is not None:
            raise UserError(f"{path} is {what}; {each} beside it has no place", hint="leave it out")
