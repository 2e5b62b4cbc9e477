"""What a folder of the LLaVA authors says: the keys of its weights and its config.json; the inverse of `original`.

The tower goes into the same files, as in the published 1.6, and `unfreeze_mm_vision_tower` makes the authors' loader
take it from there; its sizes that loader takes from the CLIP that `mm_vision_tower` names.
Facts: LLaVA's builder.py, llava_arch.py, clip_encoder.py, and the configs of the published folders.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pumice.checkpoints.hf_writer import one_or_many, preprocessor_values, text_values, vision_values
from pumice.checkpoints.original import TOWER_KEY
from pumice.checkpoints.safetensors_writer import DTYPE_NAMES
from pumice.checkpoints.settings import CLIP_MEAN, CLIP_STD
from pumice.checkpoints.sidefiles import TEMPLATE_KEY
from pumice.config import ImageConfig, LlavaConfig, ProjectorConfig, Rotary, VisionConfig
from pumice.errors import UserError

CLASSES = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}
"""model_type and class, by the language model."""
OPENAI = {224: "openai/clip-vit-large-patch14", 336: "openai/clip-vit-large-patch14-336"}
"""The towers that LLaVA was published with, by their pixels (Radford et al. 2021, table 20)."""
OPENAI_LAYERS = 24
_RATIOS = {"crop": "square", "pad": "pad", "anyres": "anyres"}
_PREPARATION = ("size", "crop_size", "image_mean", "image_std", "rescale_factor", "resample")


def original_key(name: str, projector: ProjectorConfig) -> str:
    """The key of one of pumice's names."""
    if name.startswith("multi_modal_projector.linear_"):
        number, _, part = name.removeprefix("multi_modal_projector.linear_").partition(".")
        return f"model.mm_projector.{part if projector.layers == 1 else f'{2 * int(number) - 2}.{part}'}"
    if name.startswith("vision_tower."):
        return f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_tower.')}"
    return name if name.startswith("lm_head.") else f"model.{name.removeprefix('language_model.')}"


def check_sayable(config: LlavaConfig) -> None:
    """Raises UserError for a model that the authors' classes cannot express (Transformers 4.37 below them)."""
    text, vision, image, projector = config.text, config.vision, config.image, config.projector
    if vision is None or image is None or projector is None:
        raise _unsayable("is a language model without eyes", "leave --format out: a Hugging Face folder holds it")
    rotary = text.rotary
    what = {
        "has biases in its attention, as Qwen": text.qkv_bias,
        "has heads of another width than their share of the channels": text.head_width * text.heads != text.width,
        "scales its rotary frequencies one by one": len(set(rotary.divisors)) > 1 or rotary.long_divisors != (),
        "scales the magnitude of its rotary embedding": rotary.magnitude != 1,
        "has a projector without biases": not projector.bias,
        "has a projector of more than 9 layers": projector.layers > 9,
        "reads its features from several layers of the tower": len(vision.feature_layers) != 1,
        "keeps the class token with tiles": image.mode == "anyres" and vision.keep_class_token,
    }
    for each, wrong in what.items():
        if wrong:
            raise _unsayable(each, "write a Hugging Face folder or GGUF files: leave --format out")


def _unsayable(what: str, hint: str) -> UserError:
    return UserError(f"the model {what}, which a folder of the LLaVA authors cannot say", hint=hint)


def config_values(config: LlavaConfig, dtype: torch.dtype, bos_id: int | None) -> dict[str, object]:
    """The config.json of a model that `check_sayable` lets pass."""
    vision, image, projector = config.vision, config.image, config.projector
    assert vision is not None
    assert image is not None
    assert projector is not None
    text = text_values(config.text, config.template)
    model_type, architecture = CLASSES[str(text["model_type"])]
    values = text | {
        "model_type": model_type,
        "architectures": [architecture],
        "torch_dtype": DTYPE_NAMES[dtype],
        "mm_vision_tower": openai_tower(vision) or "",
        "mm_projector_type": "linear" if projector.layers == 1 else f"mlp{projector.layers}x_gelu",
        "mm_hidden_size": vision.width,
        "mm_vision_select_layer": vision.feature_layers[0],
        "mm_vision_select_feature": "cls_patch" if vision.keep_class_token else "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "image_aspect_ratio": _RATIOS[image.mode],
        TEMPLATE_KEY: config.template,
        TOWER_KEY: _described(vision, image),
    }
    del values["head_dim"]
    values.pop("rope_scaling", None)
    if config.text.rotary.divisors:
        values["rope_scaling"] = _linear(config.text.rotary)
    if config.stop_ids:
        values["eos_token_id"] = one_or_many(config.stop_ids)
    if bos_id is not None:
        values["bos_token_id"] = bos_id
    if image.mode == "anyres":
        values["mm_patch_merge_type"] = "spatial_unpad"
        # As (width, height), the way the authors read the list.
        values["image_grid_pinpoints"] = [[width, height] for height, width in image.pinpoints]
    return values


def _linear(rotary: Rotary) -> dict[str, object]:
    return {"type": "linear", "factor": rotary.divisors[0]}


def openai_tower(vision: VisionConfig) -> str | None:
    """The published CLIP of the same sizes. A tower that lost the blocks behind its features, as the first GGUF
    converters left it, fits too: they are counted from the front."""
    layers = OPENAI_LAYERS if vision.feature_layers[0] >= 0 else vision.layers
    found = replace(vision, layers=layers, feature_layers=(), keep_class_token=False, post_norm=True)
    known = VisionConfig(vision.image_px, 14, 1024, OPENAI_LAYERS, 16, 4096, feature_layers=())
    return OPENAI.get(vision.image_px) if found == known else None


def prepared_as_clip(image: ImageConfig) -> bool:
    """Do pictures become pixels as with OpenAI's CLIP, up to the rounding of GGUF's 32 bits?"""
    numbers = zip((*image.mean, *image.std, image.rescale), (*CLIP_MEAN, *CLIP_STD, 1 / 255), strict=True)
    close = all(abs(each - clip) < 1e-6 for each, clip in numbers)
    return close and image.resize_px == image.crop_px and image.resample == 3


def _described(vision: VisionConfig, image: ImageConfig) -> dict[str, object]:
    """What the shapes of the tensors do not show, in the words of a CLIP folder's two files."""
    preparation = preprocessor_values(image)
    return {
        "vision_config": vision_values(vision),
        "image_processor": {key: preparation[key] for key in _PREPARATION},
    }
