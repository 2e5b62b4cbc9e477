"""A projector file (mmproj): the vision tower, the projector and the newline vector of a LLaVA, in GGUF.

Read in the naming of the first converters, which nearly all published files have, and in today's.
Facts: convert_image_encoder_to_gguf.py, clip.cpp, clip-impl.h.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pumice.checkpoints.fields import Fields, decimal, shown
from pumice.checkpoints.form import collected
from pumice.checkpoints.gguf_file import GgufFile, open_gguf
from pumice.checkpoints.origin import inner, origin_of
from pumice.checkpoints.settings import (
    MAX_LAYERS,
    MAX_PX,
    NEXT_PINPOINTS,
    Mode,
    channels,
    image_config,
    pinpoints,
    unsupported,
)
from pumice.checkpoints.tensors import Entry
from pumice.config import ImageConfig, ProjectorConfig, Rules, Size, VisionConfig

PROJECTOR = "clip"
"""The architecture of such a file."""

PROJECTOR_PREFIX = "mmproj-"
"""Of its name beside the language model's file, as most people have it."""
IMAGE_KEY, VISION_KEY = "pumice.image", "pumice.vision"
"""Of a file that pumice wrote: what no key of llama.cpp's says, as JSON objects."""

NAMES = {
    "v.class_embd": "vision_tower.embeddings.class_embedding",
    "v.patch_embd.weight": "vision_tower.embeddings.patch_embedding.weight",
    "v.position_embd.weight": "vision_tower.embeddings.position_embedding.weight",
    **{f"v.pre_ln.{part}": f"vision_tower.pre_layrnorm.{part}" for part in ("weight", "bias")},
    **{f"v.post_ln.{part}": f"vision_tower.post_layernorm.{part}" for part in ("weight", "bias")},
    # Under a name that llama.cpp passes over: it would run the features through this norm, which no LLaVA does.
    **{f"pumice.v.post_ln.{part}": f"vision_tower.post_layernorm.{part}" for part in ("weight", "bias")},
    "model.image_newline": "image_newline",
    "v.image_newline": "image_newline",
}
IN_BLOCK = {
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
}


@dataclass(frozen=True)
class Eyes:
    """What a projector file holds, by pumice's names."""

    path: Path
    vision: VisionConfig
    projector: ProjectorConfig
    image: ImageConfig
    entries: Mapping[str, Entry]
    width_out: int
    """Of the features: the language model's width."""
    dtypes: Mapping[str, torch.dtype]
    """Of the weights in the folder that the file was made from, where it says."""


def read_eyes(path: Path) -> Eyes:
    """Raises UserError: no projector file, or one of another kind than LLaVA's."""
    file = open_gguf(path)
    fields = file.fields
    fields.one_of("general.architecture", None, (PROJECTOR,))
    kind = fields.text("clip.projector_type", fields.text("clip.vision.projector_type", "mlp"))
    if kind != "mlp":
        raise unsupported(fields, f"the projector is of type {shown(kind)}", "'mlp', LLaVA's")
    if fields.flag("clip.use_silu", False):
        raise unsupported(fields, "clip.use_silu is true", "CLIP's towers, with quick GELU or GELU")
    layers = [int(match[1]) for name in file.tensors if (match := re.fullmatch(r"mm\.(\d{1,2})\.weight", name))]
    if not layers or sorted(layers) != list(range(0, 2 * len(layers), 2)):
        raise unsupported(
            fields, f"the projector has the layers {sorted(layers)}", "0, 2, 4…: linear layers with GELUs between"
        )
    vision = _vision(file)
    swapped = _swapped(file, vision)
    named = ((name_of(name, swapped=swapped), each.entry()) for name, each in file.tensors.items())
    entries = collected(named, path)
    projector = ProjectorConfig(len(layers), bias="mm.0.bias" in file.tensors)
    image = _image(fields, vision, newline="image_newline" in entries)
    origin = origin_of(file.values, str(path), list(entries))
    width_out = file.tensors[f"mm.{max(layers)}.weight"].shape[0]
    return Eyes(path, vision, projector, image, entries, width_out, origin.dtypes if origin else {})


def name_of(key: str, *, swapped: bool) -> str:
    """pumice's name for a tensor of a projector file; an unknown key keeps its own."""
    if key in NAMES:
        return NAMES[key]
    if match := re.fullmatch(r"mm\.(\d{1,2})\.(weight|bias)", key):
        return f"multi_modal_projector.linear_{int(match[1]) // 2 + 1}.{match[2]}"
    match = re.fullmatch(r"v\.blk\.(0|[1-9]\d{0,3})\.(\w+)\.(weight|bias)", key)
    first, second = ("ffn_down", "ffn_up") if swapped else ("ffn_up", "ffn_down")
    inner = IN_BLOCK | {first: "mlp.fc1", second: "mlp.fc2"}
    if match is None or match[2] not in inner:
        return key
    return f"vision_tower.encoder.layers.{match[1]}.{inner[match[2]]}.{match[3]}"


def _swapped(file: GgufFile, vision: VisionConfig) -> bool:
    """The first converters called the first layer of an MLP `ffn_down`. The shape tells; where it cannot, the key
    that only they wrote does."""
    first = file.tensors.get("v.blk.0.ffn_down.weight")
    if vision.width == vision.ffn_width or first is None:
        return "clip.has_llava_projector" in file.fields
    return first.shape == (vision.ffn_width, vision.width)


def _vision(file: GgufFile) -> VisionConfig:
    fields = file.fields
    layers = fields.whole("clip.vision.block_count", most=MAX_LAYERS)
    width, heads = (
        fields.whole("clip.vision.embedding_length"),
        fields.whole("clip.vision.attention.head_count", most=1024),
    )
    image_px, patch_px = (fields.whole(f"clip.vision.{name}_size", most=MAX_PX) for name in ("image", "patch"))
    if width % heads:
        raise fields.wrong("clip.vision.attention.head_count", f"a divisor of the {width} channels")
    if patch_px > image_px:
        raise fields.wrong("clip.vision.patch_size", f"at most the {image_px} pixels of the image")
    # A converter drops the blocks behind the features, so that all that it left run; it may say so.
    features = fields.wholes("clip.vision.feature_layer", least=0, most=layers) or (layers,)
    own = inner(fields, VISION_KEY)
    counted = own.wholes("feature_layers", least=-layers - 1, most=layers)
    return VisionConfig(
        image_px=image_px,
        patch_px=patch_px,
        width=width,
        layers=layers,
        heads=heads,
        ffn_width=fields.whole("clip.vision.feed_forward_length"),
        activation="gelu" if fields.flag("clip.use_gelu", False) else "quick_gelu",
        norm_eps=decimal(fields.number("clip.vision.attention.layer_norm_epsilon")),
        # From the end, as the folder had it, where that means the same.
        feature_layers=counted if tuple(each % (layers + 1) for each in counted) == features else features,
        post_norm=bool({"v.post_ln.weight", "pumice.v.post_ln.weight"} & file.tensors.keys()),
        keep_class_token=own.flag("keep_class_token", False),
    )


def _image(fields: Fields, vision: VisionConfig, *, newline: bool) -> ImageConfig:
    """How pictures become pixels: as the authors prepare them, from whose checkpoints these files are made."""
    canvases = _canvases(fields, vision) if newline else ()
    if not newline and "clip.vision.image_grid_pinpoints" in fields:
        raise unsupported(fields, "it lists canvases for tiles and has no image_newline vector", "LLaVA 1.6 with one")
    if IMAGE_KEY in fields:
        return _own_image(inner(fields, IMAGE_KEY), vision, newline=newline)
    return ImageConfig(
        mode="anyres" if newline else "pad",
        resize_px=vision.image_px,
        crop_px=vision.image_px,
        mean=channels(fields, "clip.vision.image_mean"),
        std=channels(fields, "clip.vision.image_std"),
        pinpoints=canvases,
        rules="original",
    )


def _own_image(fields: Fields, vision: VisionConfig, *, newline: bool) -> ImageConfig:
    """As the folder had it that the file was made from."""
    modes: tuple[Mode, ...] = ("anyres",) if newline else ("pad", "crop")
    rules: tuple[Rules, ...] = ("hf", "original")
    mode = fields.one_of("mode", None, modes)
    canvases = pinpoints(fields, (), vision.image_px) if newline else ()
    return replace(image_config(fields, mode, vision, canvases), rules=fields.one_of("rules", None, rules))


def _canvases(fields: Fields, vision: VisionConfig) -> tuple[Size, ...]:
    """(width, height) pairs in one row of numbers; without the key those that every LLaVA 1.6 was trained with."""
    key = "clip.vision.image_grid_pinpoints"
    values = fields.raw(key)
    if values is not None and (not isinstance(values, list) or len(values) % 2):
        raise fields.wrong(key, "pairs of sizes in one row")
    pairs = None if values is None else [values[at : at + 2] for at in range(0, len(values), 2)]
    found = pinpoints(Fields({"image_grid_pinpoints": pairs}, fields.source), NEXT_PINPOINTS, vision.image_px)
    return tuple((height, width) for width, height in found)
