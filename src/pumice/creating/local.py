"""A recipe from the files of this machine: what `ollama create` makes of a Modelfile and the paths in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pumice.creating.recipe import Recipe, no_adapter, of_modelfile
from pumice.errors import UserError
from pumice.modelfile import Modelfile
from pumice.store.hub_cache import wanted

NOTHING = "no Modelfile or safetensors files found"


def of_this_machine(said: Modelfile, folder: Path) -> Recipe:
    """What a Modelfile says that lies in `folder`. A FROM is a path where there is such a file or folder, else the name
    of a model; several are the files of one model, or a projector beside a name.

    Of a folder those files are taken that pumice reads. Raises UserError for a folder without any, and for a link that
    leads out of one.
    """
    if said.adapters:
        raise no_adapter()
    names, files = [], dict[str, Path]()
    for number, text in enumerate(said.sources):
        path = folder / Path(text).expanduser()
        if os.path.isdir(path):
            # A second folder is what the first needs beside it: a CLIP tower, the model under a LoRA.
            for place in [path, *(_named_in(path) if len(said.sources) == 1 else ())]:
                before = f"beside{len(files)}/" if files else ""
                files |= {before + each.name: each for each in _of_folder(place)}
        elif os.path.exists(path):
            files[f"{path.name}" if path.name not in files else f"{number}-{path.name}"] = path
        else:
            names.append(text)
    recipe = of_modelfile(replace(said, sources=tuple(names) or ("",)))
    return replace(recipe, source=recipe.source or None, files=files)


def _named_in(folder: Path) -> Iterator[Path]:
    """The folders that a model of the authors' names, where they are here: as `checkpoints.read` finds them."""
    for file, key in (("config.json", "mm_vision_tower"), ("adapter_config.json", "base_model_name_or_path")):
        with suppress(OSError, ValueError):
            name = json.loads((folder / file).read_bytes()).get(key)
            places = (folder.resolve().parent / Path(name).name, Path(name)) if isinstance(name, str) and name else ()
            yield from [each for each in places if (each / "config.json").is_file()][:1]


def _of_folder(folder: Path) -> Iterator[Path]:
    inside = folder.resolve()
    here = sorted(os.listdir(folder))
    weights = [each for each in wanted(here) if each.endswith((".safetensors", ".bin"))]
    chosen = wanted(here) if weights else [each for each in here if each.lower().endswith(".gguf")]
    if not chosen:
        raise UserError(NOTHING, hint=f"looked in {folder}; write a Modelfile, or name a folder with a model")
    for name in chosen:
        path = folder / name
        if not path.resolve().is_relative_to(inside):
            raise UserError(f"{name} is a link that leads out of {folder}", hint="put the file itself there")
        yield path
