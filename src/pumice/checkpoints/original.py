"""The LLaVA authors' folders: 1.5 without its vision tower, 1.6 with it, a projector alone, LoRA adapters.

Facts: LLaVA's builder.py (what is loaded from where), llava_arch.py, clip_encoder.py, multimodal_projector/builder.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pumice.checkpoints import lora
from pumice.checkpoints.companions import TOWER_TYPES, Companions
from pumice.checkpoints.fields import Fields, json_if_there, read_json, shown
from pumice.checkpoints.form import Checkpoint, checked, renamed
from pumice.checkpoints.settings import Mode, image_config, pinpoints, text_config, unsupported, vision_config
from pumice.checkpoints.sidefiles import TEMPLATE_KEY, stop_ids, template_name, usual_template
from pumice.checkpoints.tensors import Entry, open_file, open_weights
from pumice.config import ImageConfig, LlavaConfig, ProjectorConfig, VisionConfig
from pumice.errors import UserError
from pumice.tokenizer import Tokenizer

KINDS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
"""model_type, and the language model behind it."""

TOWER_KEY = "pumice_tower"
"""In a config.json that pumice wrote: what the CLIP folder of the tower in the same files would say."""


@dataclass(frozen=True)
class _Tower:
    """A vision tower: its weights by pumice's names, and the two files that describe it, empty when not at hand."""

    entries: Mapping[str, Entry]
    config: Fields
    preprocessor: Fields


def is_original(config: Fields) -> bool:
    """Only the authors' code writes mm_… keys into config.json; Transformers' has a text_config."""
    return "text_config" not in config and any(key.startswith("mm_") for key in config.names)


def read(folder: Path, config: Fields, companions: Companions, template: str | None) -> Checkpoint:
    """The checkpoint in a folder whose config.json is `config`. Raises UserError; see `checkpoints.read`."""
    kind = _kind(config)
    mode = _mode(config)
    entries, home = _weights(folder, companions)
    tower = _tower(folder, config, entries, companions)
    entries = {**tower.entries, **entries}
    tokenizer = Tokenizer.from_folder(home)
    text = text_config(config, kind, tied=config.flag("tie_word_embeddings", False))
    if (table := entries.get("language_model.embed_tokens.weight")) is not None and len(table.shape) == 2:
        # The authors' loader adds tokens (<im_patch>) and rows without writing the new count into every config.
        text = replace(text, vocab=table.shape[0])
    generation = folder if (folder / "generation_config.json").is_file() else home
    stops = stop_ids(json_if_there(generation / "generation_config.json"), (config,), tokenizer, text.vocab)
    vision = _vision(tower, config)
    # The authors choose a template by the model's name; a chat template in such a folder is the base model's.
    named = template_name(template, folder, config) if template is not None or TEMPLATE_KEY in config else None
    whole = LlavaConfig(
        text,
        vision,
        _projector(config),
        _image(config, mode, tower, vision),
        named or usual_template(kind, stops, tokenizer),
        stops,
        has_newline=mode == "anyres",
        family="llava-1.6" if mode == "anyres" else "llava-1.5",
    )
    return Checkpoint(folder, "original", whole, tokenizer, checked(entries, whole, folder), home=home)


# --- config.json ------------------------------------------------------------------------------------------------------


def _kind(config: Fields) -> str:
    model_type = config.text("model_type")
    if model_type not in KINDS:
        raise unsupported(config, f"the model is of type {shown(model_type)}", ", ".join(KINDS))
    if config.flag("mm_use_im_start_end", False):
        raise unsupported(
            config, "mm_use_im_start_end is true (models and delta weights from before LLaVA 1.5)", "LLaVA 1.5 and 1.6"
        )
    if "mm_resampler_type" in config:
        raise unsupported(config, "mm_resampler_type is set", "models without a resampler")
    return KINDS[model_type]


def _mode(config: Fields) -> Mode:
    """What the authors do with a picture. The merge type matters for tiles only."""
    ratio = config.one_of("image_aspect_ratio", "square", ("square", "pad", "anyres"))
    merge = config.text("mm_patch_merge_type", "flat")
    if merge != ("spatial_unpad" if ratio == "anyres" else "flat"):
        raise unsupported(
            config,
            f"image_aspect_ratio {ratio!r} comes with mm_patch_merge_type {shown(merge)}",
            "'anyres' with 'spatial_unpad', and 'pad' or 'square' with 'flat'",
        )
    modes: dict[str, Mode] = {"square": "crop", "pad": "pad", "anyres": "anyres"}
    return modes[ratio]


def _projector(config: Fields) -> ProjectorConfig:
    name = config.text("mm_projector_type", "linear")
    match = re.fullmatch(r"mlp([1-9])x_gelu", name)
    if name != "linear" and match is None:
        raise unsupported(config, f"mm_projector_type is {shown(name)}", "'linear', and 'mlp2x_gelu' with any count")
    return ProjectorConfig(layers=1 if match is None else int(match[1]))


def _vision(tower: _Tower, config: Fields) -> VisionConfig:
    layer = config.whole("mm_vision_select_layer", least=-513, most=512)
    select = config.one_of("mm_vision_select_feature", "patch", ("patch", "cls_patch"))
    if select == "cls_patch" and config.raw("image_aspect_ratio") == "anyres":
        raise unsupported(config, "mm_vision_select_feature is 'cls_patch' with tiles", "'patch'")
    return vision_config(tower.config, (layer,), keep_class_token=select == "cls_patch")


def _image(config: Fields, mode: Mode, tower: _Tower, vision: VisionConfig) -> ImageConfig:
    """The tower's preprocessing under the authors' rules: pinpoints are (width, height), and nothing is rounded."""
    canvases = pinpoints(config, (), vision.image_px) if mode == "anyres" else ()
    if mode == "anyres" and not canvases:
        raise UserError(f"{config.source} has no image_grid_pinpoints", hint="the file is incomplete; get it again")
    turned = tuple((height, width) for width, height in canvases)
    fields = tower.preprocessor
    if not fields.names:
        fields = Fields({"size": vision.image_px, "crop_size": vision.image_px}, "CLIP's preprocessing")
    return replace(image_config(fields, mode, vision, turned), rules="original")


# --- weights ----------------------------------------------------------------------------------------------------------


def _weights(folder: Path, companions: Companions) -> tuple[dict[str, Entry], Path]:
    """Everything but a separate tower, by pumice's names, and the folder that has the tokenizer."""
    adapter, base = folder / "adapter_config.json", companions.base
    own = open_weights(folder)
    if own and not adapter.is_file():
        if base is not None:
            raise UserError(
                f"{folder} is a whole model; the language model {base} beside it has no place",
                hint="leave it out, or name the folder of the adapter or projector that goes over it",
            )
        return renamed(own, folder), folder
    if adapter.is_file():
        config = read_json(adapter)
        base = base or _sibling(folder, config.text("base_model_name_or_path", ""), companions)
        extra = folder / "non_lora_trainables.bin"
    else:
        extra = folder / "mm_projector.bin"
        if not extra.is_file():
            raise UserError(
                f"{folder} holds no weights",
                hint="a checkpoint has .safetensors or .bin shards, an adapter or mm_projector.bin",
            )
    if base is None:
        raise UserError(
            f"{folder} is an adapter or a projector alone; the language model under it was not found",
            hint="name its folder too: --with FOLDER, or beside=[...] in Python",
        )
    entries = renamed(open_weights(base), base)
    if extra.is_file():
        entries |= renamed({_unwrapped(key): entry for key, entry in open_file(extra).items()}, extra)
    if adapter.is_file():
        entries = lora.merged(entries, folder, config)
    return entries, base


def _unwrapped(key: str) -> str:
    """PEFT wraps the model once; the authors' model then begins with `model.`."""
    return key.removeprefix("base_model.model.") if key.startswith("base_model.model.") else key


def _sibling(folder: Path, name: str, companions: Companions) -> Path | None:
    """A folder that a config names (`openai/clip-vit-…`): beside the checkpoint by its last part, or as a path."""
    if not name or len(name) > 1024:
        return None
    candidates = (folder.resolve().parent / Path(name).name, *(() if companions.alone else (Path(name),)))
    return next((each for each in candidates if (each / "config.json").is_file()), None)


def _tower(folder: Path, config: Fields, entries: Mapping[str, Entry], companions: Companions) -> _Tower:
    """1.6 was trained with its tower and holds it; for 1.5 the weights are those of the CLIP that its config names."""
    name, own = config.text("mm_vision_tower", ""), config.inner(TOWER_KEY)
    inside, given = any(key.startswith("vision_tower.") for key in entries), companions.tower
    if inside and given is None and own.names:
        return _Tower({}, _measured(entries, own.inner("vision_config"), folder), own.inner("image_processor"))
    place = given or _sibling(folder, name, companions)
    described = _described(place) if place is not None else Fields({}, "no tower")
    preprocessor = json_if_there(place / "preprocessor_config.json") if place is not None else Fields({}, "no tower")
    if inside:
        return _Tower({}, _measured(entries, described, folder), preprocessor)
    if place is None:
        raise UserError(
            f"{folder} comes without its vision tower {shown(name)}, and no folder of that name is beside it",
            hint="put that CLIP model beside it, or name its folder: --with FOLDER, or beside=[...] in Python",
        )
    return _Tower(_clip(place), described, preprocessor)


def _described(place: Path) -> Fields:
    config = read_json(place / "config.json")
    model_type = config.text("model_type", "")
    if model_type not in TOWER_TYPES:
        raise unsupported(config, f"the vision tower is of type {shown(model_type)}", "OpenAI's CLIP")
    return config.inner("vision_config") if model_type == "clip" else config


def _clip(place: Path) -> dict[str, Entry]:
    """The vision half of a CLIP folder."""
    entries = open_weights(place)
    if not entries:
        raise UserError(f"{place} holds no weights", hint="download the whole CLIP model")
    text_half = ("text_model.", "logit_scale", "visual_projection.", "text_projection.")
    vision = {key: entry for key, entry in entries.items() if not key.startswith(text_half)}
    return renamed({f"vision_tower.{key}": entry for key, entry in vision.items()}, place)


def _measured(entries: Mapping[str, Entry], described: Fields, folder: Path) -> Fields:
    """A tower's config from the shapes of its tensors, which do not show heads, activation and epsilon: those come from
    a CLIP config of the same width when one is at hand. Without one they are those of every CLIP that LLaVA was
    published with: 64 channels a head (Radford et al. 2021, table 20), quick GELU, 1e-5."""
    stem = "vision_tower.embeddings"
    patch = _shape(entries, f"{stem}.patch_embedding.weight", 4, folder)
    positions, width = _shape(entries, f"{stem}.position_embedding.weight", 2, folder)
    fc1 = _shape(entries, "vision_tower.encoder.layers.0.mlp.fc1.weight", 2, folder)
    side = math.isqrt(max(0, positions - 1))
    block = re.compile(r"vision_tower\.encoder\.layers\.(\d{1,4})\.")
    layers = [int(match[1]) for match in map(block.match, entries) if match]
    values: dict[str, object] = {
        "hidden_size": width,
        "intermediate_size": fc1[0],
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": max(1, width // 64),
        "patch_size": patch[-1],
        "image_size": side * patch[-1],
    }
    if described.raw("hidden_size") == width:
        kept = ("num_attention_heads", "hidden_act", "layer_norm_eps")
        values |= {key: described.raw(key) for key in kept if key in described}
    return Fields(values, f"{folder}, the vision tower's shapes")


def _shape(entries: Mapping[str, Entry], name: str, axes: int, folder: Path) -> tuple[int, ...]:
    shape = entries[name].shape if name in entries else None
    if shape is None or len(shape) != axes:
        found = "is missing" if shape is None else f"has the shape {list(shape)}"
        raise UserError(f"{folder}: {name} {found}", hint="the vision tower in it is incomplete; get the files again")
    return shape
