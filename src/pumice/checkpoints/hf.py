"""Hugging Face folders: LlavaForConditionalGeneration, LlavaNextForConditionalGeneration, and language models alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pumice.checkpoints.fields import Fields, json_if_there, shown
from pumice.checkpoints.form import Checkpoint, checked, collected, renamed, unfused
from pumice.checkpoints.settings import (
    NEXT_PINPOINTS,
    Mode,
    image_config,
    pinpoints,
    text_config,
    unsupported,
    vision_config,
)
from pumice.checkpoints.sidefiles import stop_ids, template_name, usual_template
from pumice.checkpoints.tensors import open_weights
from pumice.config import ImageConfig, LlavaConfig, ProjectorConfig, Size, TextConfig, VisionConfig
from pumice.errors import UserError
from pumice.tokenizer import Tokenizer

FAMILIES = {"llava": "llava-1.5", "llava_next": "llava-1.6"}
TEXT_MODELS = ("llama", "mistral", "qwen2", "phi3")

CLIP_L_336: dict[str, object] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""The tower of a LlavaConfig that has no vision_config."""


@dataclass(frozen=True)
class _Eyes:
    vision: VisionConfig
    projector: ProjectorConfig
    image: ImageConfig
    image_token_id: int


def read(folder: Path, config: Fields, template: str | None) -> Checkpoint:
    """The checkpoint in a folder whose config.json is `config`. Raises UserError; see `checkpoints.read`."""
    model_type = config.text("model_type", "")
    if model_type not in FAMILIES and model_type not in TEXT_MODELS:
        raise UserError(
            f"{folder} is a model of type {shown(model_type)}",
            hint=f"pumice runs {', '.join(FAMILIES)} with CLIP towers, and {', '.join(TEXT_MODELS)} without eyes",
        )
    if "quantization_config" in config:
        raise unsupported(config, "the weights are quantised (quantization_config)", "weights in 16 or 32 bits")
    tokenizer = Tokenizer.from_folder(folder)
    text_fields = config.inner("text_config") if model_type in FAMILIES else config
    kind = text_fields.text("model_type", "llama")
    text = text_config(text_fields, kind, tied=_tied(config, text_fields, model_type))
    stops = stop_ids(json_if_there(folder / "generation_config.json"), (config, text_fields), tokenizer, text.vocab)
    whole = _assembled(
        text,
        _eyes(folder, config, tokenizer) if model_type in FAMILIES else None,
        FAMILIES.get(model_type, "text"),
        template_name(template, folder, config) or usual_template(kind, stops, tokenizer),
        stops,
    )
    entries = open_weights(folder)
    if not entries:
        raise UserError(
            f"{folder} holds no weights",
            hint="a checkpoint has model.safetensors or pytorch_model.bin, whole or in shards with an index; get them",
        )
    own = collected(unfused(renamed(entries, folder).items(), text), folder)
    return Checkpoint(folder, "hf", whole, tokenizer, checked(own, whole, folder))


def _assembled(text: TextConfig, eyes: _Eyes | None, family: str, template: str, stops: tuple[int, ...]) -> LlavaConfig:
    if eyes is None:
        return LlavaConfig(text, None, None, None, template, stops)
    return LlavaConfig(
        text,
        eyes.vision,
        eyes.projector,
        eyes.image,
        template,
        stops,
        image_token_id=eyes.image_token_id,
        has_newline=eyes.image.mode == "anyres",
        family=family,
    )


def _tied(config: Fields, text_fields: Fields, model_type: str) -> bool:
    """LlavaConfig takes the flag from its text_config when its own is not set; LlavaNextConfig does not."""
    own = config.flag("tie_word_embeddings", False)
    return own or (model_type == "llava" and text_fields.flag("tie_word_embeddings", False))


def _eyes(folder: Path, config: Fields, tokenizer: Tokenizer) -> _Eyes:
    if config.text("projector_hidden_act", "gelu") != "gelu":
        raise unsupported(config, f"projector_hidden_act is {shown(config.raw('projector_hidden_act'))}", "gelu")
    strategy = config.one_of("vision_feature_select_strategy", "default", ("default", "full"))
    if strategy == "full" and config.raw("model_type") == "llava_next":
        raise unsupported(config, "vision_feature_select_strategy is 'full'", "llava_next with 'default'")
    layers = config.wholes("vision_feature_layer", least=-513, most=512) or (-2,)
    tower = config.inner("vision_config") if "vision_config" in config else Fields(CLIP_L_336, config.source)
    vision = vision_config(tower, layers, keep_class_token=strategy == "full")
    projector = ProjectorConfig(layers=2, bias=config.flag("multimodal_projector_bias", True))
    return _Eyes(vision, projector, _image(folder, config, vision), _image_token(config, tokenizer))


def _image_token(config: Fields, tokenizer: Tokenizer) -> int:
    """The id of `<image>`, on which config and tokenizer must agree: tokenizers of some published folders, rebuilt by
    certain versions of Transformers, moved it (its issues 29774, 29836 and 31901)."""
    key = "image_token_id" if "image_token_id" in config else "image_token_index"
    from_config = config.whole(key, 32000, least=0)
    from_tokenizer = tokenizer.id_of("<image>")
    if from_config != from_tokenizer:
        found = "does not have it" if from_tokenizer is None else f"has {from_tokenizer}"
        raise UserError(
            f"{config.source}: {key} says that <image> is token {from_config}; the tokenizer beside it {found}",
            hint="the tokenizer's files are of another version than the config; get them from the same revision",
        )
    return from_config


def _image(folder: Path, config: Fields, vision: VisionConfig) -> ImageConfig:
    """From processor_config.json where Transformers 5 puts it, else from preprocessor_config.json."""
    fields = json_if_there(folder / "processor_config.json").inner("image_processor")
    if not fields.names:
        fields = json_if_there(folder / "preprocessor_config.json")
    if not fields.names:
        raise UserError(
            f"{folder} does not say how images are prepared: it has no preprocessor_config.json",
            hint="get that file, or processor_config.json, from where the checkpoint came",
        )
    mode = _mode(fields, config.text("model_type"))
    if mode != "anyres":
        return image_config(fields, mode, vision, ())
    model_pinpoints = pinpoints(config, NEXT_PINPOINTS, vision.image_px) if "image_grid_pinpoints" in config else ()
    return image_config(fields, mode, vision, _agreed(fields, model_pinpoints, vision))


def _mode(fields: Fields, model_type: str) -> Mode:
    """By the image processor's class; a class without a name is the model's usual one."""
    usual = "LlavaNextImageProcessor" if model_type == "llava_next" else "LlavaImageProcessor"
    key = "image_processor_type" if "image_processor_type" in fields else "feature_extractor_type"
    name = fields.text(key, usual).removesuffix("Fast").removesuffix("Pil")
    match model_type, name:
        case "llava", "CLIPImageProcessor" | "CLIPFeatureExtractor":
            return "crop"
        case "llava", "LlavaImageProcessor":
            return "pad" if fields.flag("do_pad", False) else "crop"
        case "llava_next", "LlavaNextImageProcessor":
            return "anyres"
    known = usual if model_type == "llava_next" else f"{usual} or CLIPImageProcessor"
    raise fields.wrong(key, f"{known} for a {model_type} model")


def _agreed(fields: Fields, of_model: tuple[Size, ...], vision: VisionConfig) -> tuple[Size, ...]:
    """The processor cuts tiles by its own list, the model puts them together by another; they must be the same."""
    of_processor = pinpoints(fields, of_model or NEXT_PINPOINTS, vision.image_px)
    if of_model and of_model != of_processor:
        raise UserError(
            f"{fields.source} and config.json list different image_grid_pinpoints",
            hint="they belong to different models; get both files from the same revision",
        )
    return of_processor
