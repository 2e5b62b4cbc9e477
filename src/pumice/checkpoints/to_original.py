"""A checkpoint as a folder of the LLaVA authors, its tower included; with the files of the one it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from pumice.checkpoints import original
from pumice.checkpoints.companions import Companions
from pumice.checkpoints.fields import read_json
from pumice.checkpoints.folder import put_weights, weights_of, words_of, written
from pumice.checkpoints.form import Checkpoint
from pumice.checkpoints.gguf import IMAGE_TOKEN
from pumice.checkpoints.hf_writer import one_or_many
from pumice.checkpoints.origin import SOURCE_FILE, Origin, files_of, json_bytes, put_files, put_source
from pumice.checkpoints.original_writer import (
    check_sayable,
    config_values,
    original_key,
    prepared_as_clip,
)
from pumice.checkpoints.report import Progress, Report
from pumice.checkpoints.safetensors_writer import main_dtype
from pumice.checkpoints.whole import check_free, whole
from pumice.config import LlavaConfig
from pumice.errors import UserError

GENERATION = "generation_config.json"
_KEPT = ("architectures", "model_type", "mm_vision_tower", "bos_token_id", "eos_token_id")
"""Of a config.json of the authors', what another could say too."""
_NOT_KEPT = ("config.json", "adapter_config.json", SOURCE_FILE)
"""Of a folder of theirs: what is said anew, and what is true no more."""


def write_original(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: torch.dtype | None,
    origin: Origin | None,
    *,
    force: bool,
    progress: Progress,
) -> Report:
    """A new folder, which appears whole or not at all. `dtype` as in `to_hf.write_folder`.

    Raises UserError: a folder that is there already; a model that the authors' classes cannot express; a full disk.
    """
    check_free(folder, replace=force)
    check_sayable(checkpoint.config)
    config = _theirs(checkpoint.config)
    assert config.projector is not None
    weights = {
        original_key(name, config.projector): each
        for name, each in weights_of(checkpoint, config, dtype, origin).items()
    }
    values = config_values(config, main_dtype(weights), checkpoint.tokenizer.bos_id)
    words, kept = words_of(checkpoint, origin), files_of(origin, "original")
    with whole(folder, replace=force) as partial:
        partial.mkdir()
        put_weights(partial, weights, progress)
        for said in (back := _with_theirs(kept, values), *_anew(config, values, words, origin)):
            if _describe(partial, config, said):
                break
        else:
            raise AssertionError("the folder describes another model")
        if origin is not None and said is not back:
            put_source(partial, "original", origin, dtype)
    config_json = json.loads(said["config.json"])
    return Report((written(folder, weights),), (), _notes(checkpoint.config, config_json, folder, words))


def _theirs(config: LlavaConfig) -> LlavaConfig:
    """The model as a reader of the folder will find it: the authors' rules, the same canvases in the same order, a
    tower with its last norm, and no token for an image."""
    assert config.vision is not None
    assert config.image is not None
    vision, image = replace(config.vision, post_norm=True), replace(config.image, rules="original")
    return replace(config, vision=vision, image=image, image_token_id=IMAGE_TOKEN)


def _with_theirs(kept: Mapping[str, bytes], values: Mapping[str, object]) -> dict[str, bytes]:
    """The small files of the authors' folder that this model was, with what is now true in its config.json."""
    own = {name: data for name, data in kept.items() if name not in _NOT_KEPT}
    if "config.json" in kept:
        old = json.loads(kept["config.json"])
        own["config.json"] = json_bytes({**old, **values, **{key: old[key] for key in _KEPT if key in old}})
    return own


def _anew(
    config: LlavaConfig, values: Mapping[str, object], words: Mapping[str, bytes], origin: Origin | None
) -> Iterator[dict[str, bytes]]:
    """The small files in words of our own, first with the source's settings of answers, which may name end tokens."""
    own = {**words, "config.json": json_bytes(values)}
    if origin is not None and GENERATION in origin.files:
        yield own | {GENERATION: origin.files[GENERATION]}
    generation = {"eos_token_id": one_or_many(config.stop_ids)} if config.stop_ids else {}
    yield own | {GENERATION: json_bytes(generation)}


def _describe(folder: Path, config: LlavaConfig, files: Mapping[str, bytes]) -> bool:
    """Puts the files beside the weights, and takes them away again where they do not say what the model is."""
    put_files(folder, files)
    try:
        same = original.read(folder, read_json(folder / "config.json"), Companions(), None).config == config
    except UserError:
        same = False
    if not same:
        for name in files:
            (folder / name).unlink()
    return same


def _notes(
    before: LlavaConfig, config_json: Mapping[str, object], folder: Path, words: Mapping[str, bytes]
) -> tuple[str, ...]:
    """What the authors' code makes of the folder that a user should know."""
    vision, image = before.vision, before.image
    assert vision is not None
    assert image is not None
    wanted = ("llava", "mistral") if "mistral" in str(config_json["model_type"]) else ("llava",)
    lacking = [word for word in wanted if word not in folder.name.lower()]
    found = {
        f"the authors' code goes by the folder's name, which must have {' and '.join(wanted)} in it": bool(lacking),
        "padding is cut off as the authors do it; in rare sizes Transformers keeps a row more or less": (
            image.mode == "anyres" and image.rounds_unpad
        ),
        "pictures are cropped to a square, as in the source; the authors' own 1.5 pads them (image_aspect_ratio)": (
            image.mode == "crop"
        ),
        "the tower came without its last norm, which no feature passes; the folder has one without effect": (
            not vision.post_norm
        ),
        "no CLIP of OpenAI's has the tower's sizes, which the authors' code takes from mm_vision_tower: "
        "name a folder of such a CLIP there": config_json.get("mm_vision_tower", "") == "",
        "the authors' code prepares pictures as the CLIP of mm_vision_tower has it, and this model has another way": (
            not prepared_as_clip(image)
        ),
        "there is no tokenizer.model, which the authors' code asks for with Llama's tokenizer": (
            "tokenizer.model" not in words
        ),
    }
    return tuple(note for note, true in found.items() if true)
