"""A vision tower and its projector as a projector file (mmproj); the inverse of `gguf_eyes`.

In today's naming: the whole tower, with `clip.vision.feature_layer` to say where it is read out.
Facts: clip.cpp, clip-impl.h, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pumice.checkpoints.gguf_eyes import IMAGE_KEY, IN_BLOCK, NAMES, PROJECTOR, VISION_KEY
from pumice.checkpoints.gguf_file import ToStore, Value
from pumice.checkpoints.gguf_writer import EYES, stored_format
from pumice.checkpoints.mixes import fitting
from pumice.checkpoints.recoded import recoded
from pumice.checkpoints.tensors import Tensors
from pumice.config import ImageConfig, VisionConfig
from pumice.quant import FORMATS, Format

FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}
"""General.file_type of what a projector file may be written as."""

# The last of several keys with one meaning is the one to write: today's newline, the hidden norm.
_KEYS = {name: key for key, name in NAMES.items()}
_KEYS_IN_BLOCK = {name: key for key, name in (IN_BLOCK | {"ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}).items()}
_NEVER_IN_BLOCKS = (
    "vision_tower.embeddings.patch_embedding.weight",
    "vision_tower.embeddings.position_embedding.weight",
)


def eyes_key_of(name: str) -> str:
    """The name in a projector file of a tensor, by pumice's name."""
    if name in _KEYS:
        return _KEYS[name]
    if match := re.fullmatch(r"multi_modal_projector\.linear_(\d+)\.(weight|bias)", name):
        return f"mm.{2 * int(match[1]) - 2}.{match[2]}"
    match = re.fullmatch(r"vision_tower\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match is not None, name
    return f"v.blk.{match[1]}.{_KEYS_IN_BLOCK[match[2]]}.{match[3]}"


def eyes_formats(tensors: Tensors, wanted: Format | None) -> dict[str, Format]:
    """What each tensor is stored as, by pumice's names. `wanted` is the type of the matrices, None keeps theirs."""
    formats = {}
    for name in tensors.names():
        if not name.startswith(EYES):
            continue
        shape = tensors.shape(name)
        format = wanted or stored_format(tensors, name)
        if len(shape) == 1 or name == _NEVER_IN_BLOCKS[1]:
            format = FORMATS["F32"]
        elif name == _NEVER_IN_BLOCKS[0]:
            # llama.cpp's convolution has these two.
            format = FORMATS["F16" if format.name == "F16" else "F32"]
        formats[name] = fitting(format, shape[-1])
    return formats


def eyes_tensors(tensors: Tensors, formats: Mapping[str, Format]) -> list[ToStore]:
    return [
        ToStore(eyes_key_of(name), tensors.shape(name), format, functools.partial(_load, tensors, name, format))
        for name, format in formats.items()
    ]


def _load(tensors: Tensors, name: str, format: Format) -> np.ndarray[Any, Any]:
    return recoded(name, tensors.stored(name), format)


def eyes_values(vision: VisionConfig, image: ImageConfig, width_out: int, name: str) -> dict[str, Value]:
    """The metadata of a projector file, but for its types. `width_out` is that of the language model."""
    values = {
        "general.architecture": Value("string", PROJECTOR),
        "general.type": Value("string", "mmproj"),
        "general.name": Value("string", name),
        "clip.has_vision_encoder": Value("bool", True),
        "clip.projector_type": Value("string", "mlp"),
        "clip.use_gelu": Value("bool", vision.activation == "gelu"),
        **_numbers(vision, width_out),
        "clip.vision.feature_layer": Value("i32", [_counted(each, vision.layers) for each in vision.feature_layers]),
        "clip.vision.image_mean": Value("f32", list(image.mean)),
        "clip.vision.image_std": Value("f32", list(image.std)),
    }
    if image.mode == "anyres":
        # As (width, height), the way the authors' list is read.
        edges = [edge for height, width in image.pinpoints for edge in (width, height)]
        values["clip.vision.image_grid_pinpoints"] = Value("i32", edges)
        values["clip.vision.mm_patch_merge_type"] = Value("string", "spatial_unpad")
    own = {"feature_layers": list(vision.feature_layers), "keep_class_token": vision.keep_class_token}
    return values | {
        VISION_KEY: Value("string", json.dumps(own)),
        IMAGE_KEY: Value("string", json.dumps(_described(image))),
    }


def _numbers(vision: VisionConfig, width_out: int) -> dict[str, Value]:
    counts = {
        "image_size": vision.image_px,
        "patch_size": vision.patch_px,
        "embedding_length": vision.width,
        "feed_forward_length": vision.ffn_width,
        "projection_dim": width_out,
        "block_count": vision.layers,
        "attention.head_count": vision.heads,
    }
    return {f"clip.vision.{key}": Value("u32", count) for key, count in counts.items()} | {
        "clip.vision.attention.layer_norm_epsilon": Value("f32", vision.norm_eps)
    }


def _counted(layer: int, layers: int) -> int:
    """A feature layer counted from the front."""
    return layer if layer >= 0 else layers + 1 + layer


def _described(image: ImageConfig) -> dict[str, object]:
    """As a preprocessor_config.json has it, with the mode and whose rules they are."""
    size = image.resize_px
    return {
        "mode": image.mode,
        "rules": image.rules,
        "size": {"shortest_edge": size} if isinstance(size, int) else {"height": size[0], "width": size[1]},
        "crop_size": image.crop_px,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "rescale_factor": image.rescale,
        "resample": image.resample,
        **({"image_grid_pinpoints": [list(pair) for pair in image.pinpoints]} if image.pinpoints else {}),
    }
