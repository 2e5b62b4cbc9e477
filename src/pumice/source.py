"""Where a model comes from, before its weights are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pumice import checkpoints, prompt, store
from pumice.dialogue import Dressing
from pumice.errors import UserError


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and what is to differ from what its files say.

    name: a folder in Hugging Face's or the LLaVA authors' format, a .gguf file, or a model that is installed (`pebble`,
    `llava:7b`).
    template: a prompt template's name instead of the checkpoint's own. preprocess: `hf` or `original`, whose rules
    images follow instead of the checkpoint's. beside: what else the checkpoint needs: the CLIP tower of an authors' 1.5
    folder, the language model under a LoRA or a lone projector, the mmproj file of a GGUF; each is known by itself.
    """

    name: str | Path
    template: str | None = None
    preprocess: Literal["hf", "original"] | None = None
    beside: tuple[str | Path, ...] = ()

    def checkpoint(self) -> checkpoints.Checkpoint:
        """The checkpoint with these choices applied, its weights not yet read."""
        found = store.read(self.name, beside=self.beside, template=self.template)
        if self.template is not None:
            found = _ending_with(found, prompt.TEMPLATES[found.config.template].end)
        if self.preprocess is None:
            return found
        if self.preprocess not in ("hf", "original"):
            raise UserError(f"preprocess is {self.preprocess!r}", hint="give hf or original")
        if found.config.image is None:
            raise UserError(
                f"preprocess is {self.preprocess!r}, and {self.name} is a text model",
                hint="leave it out, or load a LLaVA",
            )
        config = replace(found.config, image=found.config.image.under(self.preprocess))
        return replace(found, config=config)

    def dressing(self) -> Dressing:
        """What its store says of it; a template that was chosen goes before the store's. Raises UserError."""
        stored = store.files(self.name).stored
        own = Dressing() if stored is None else Dressing.of(stored)
        return own if self.template is None else replace(own, template=None)


def _ending_with(found: checkpoints.Checkpoint, end: str) -> checkpoints.Checkpoint:
    """The checkpoint with one more end token: that of a template which is not the one it was trained with."""
    token = found.tokenizer.id_of(end) if end else None
    if token is None or token in found.config.stop_ids:
        return found
    stop_ids = (*found.config.stop_ids, token)
    return replace(found, config=replace(found.config, stop_ids=stop_ids))
