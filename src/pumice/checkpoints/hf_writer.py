"""Writing Hugging Face folders that Transformers 4 and 5 load: the key names of the published repositories."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pumice import prompt
from pumice.chat_template import template_for
from pumice.checkpoints.form import expected_tensors
from pumice.checkpoints.safetensors_writer import DTYPE_NAMES, Weight, main_dtype, put_shards
from pumice.checkpoints.sidefiles import TEMPLATE_KEY, TOKENIZER_FILES, chat_template
from pumice.checkpoints.tensors import listed
from pumice.checkpoints.whole import check_free, whole
from pumice.config import ImageConfig, LlavaConfig, TextConfig, VisionConfig
from pumice.errors import UserError
from pumice.tokenizer import Tokenizer


def write_hf(
    folder: Path,
    config: LlavaConfig,
    state: Mapping[str, Tensor],
    *,
    tokenizer_files: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a checkpoint as a new folder, which appears whole or not at all.

    state: the tensors of `expected_tensors(config)`. tokenizer_files: a folder whose tokenizer is copied. dtype: what
    the weights are cast to; None keeps theirs. A shard is as large as max_shard_bytes, or as its one tensor.

    Raises UserError: what `check_writable` raises; the state does not fit the config.
    """
    check_writable(folder, config, tokenizer_files=tokenizer_files)
    expected = expected_tensors(config)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if wrong:
        raise UserError(
            f"the weights do not fit the config: {listed(wrong)} is missing, extra or of another shape",
            hint="write a model with the config that it was made from",
        )
    weights = {
        name: Weight(tuple(tensor.shape), dtype or tensor.dtype, functools.partial(state.__getitem__, name))
        for name, tensor in state.items()
    }
    with whole(folder) as partial:
        partial.mkdir()
        for _ in put_shards(partial, hub_weights(weights), max_shard_bytes):
            pass
        put_descriptions(partial, config, main_dtype(weights))
        _copy_tokenizer(partial, tokenizer_files, config.template)


def check_writable(folder: Path, config: LlavaConfig, *, tokenizer_files: Path) -> None:
    """For those who have long work to do before they write: would `write_hf` take this folder and this config?

    Raises UserError: the folder is there already and not empty; a config that Transformers' classes cannot express (a
    projector of another depth, the authors' image rules, no <image> token).
    """
    check_free(folder)
    check_sayable(config, tokenizer_files=tokenizer_files)


def check_sayable(config: LlavaConfig, *, tokenizer_files: Path) -> None:
    """Raises UserError for a config that Transformers' classes cannot express."""
    if config.text.qkv_bias and config.text.window is not None:
        raise UserError(
            "the language model has both biases and a sliding window, which no type of Transformers' has together",
            hint="keep this model in its own format",
        )
    if config.vision is None or config.projector is None or config.image is None:
        return
    if config.projector.layers != 2:
        raise UserError(
            f"the projector has {config.projector.layers} layers; Transformers' LLaVA has 2",
            hint="the authors' format has any: --format original; to train, start from a model whose projector has 2",
        )
    found = Tokenizer.from_folder(tokenizer_files).id_of("<image>")
    if found != config.image_token_id or found is None:
        raise UserError(
            f"<image> is token {config.image_token_id} to the model and {found} to the tokenizer in {tokenizer_files}",
            hint="Transformers needs it in the vocabulary: start from this model's Hugging Face folder, "
            "or add the token and a row of the embedding first",
        )
    if config.image.mode == "anyres" and not (config.image.rounds_unpad and config.has_newline):
        raise UserError(
            "the model prepares images by the LLaVA authors' rules, which a Hugging Face folder cannot say",
            hint="""take Transformers' rules, preprocess = "hf" in a recipe and config.image.under("hf") in Python; """
            "answers may change",
        )
    if config.family == "llava-1.6" and config.vision.keep_class_token:
        raise UserError(
            "LLaVA 1.6 in Transformers has no class token among its features",
            hint="write it as LLaVA 1.5; to train, start from a model whose features are the patches alone",
        )


# --- weights ----------------------------------------------------------------------------------------------------------


def hub_key(name: str, *, eyes: bool) -> str:
    """The published key of one of pumice's names; a language model alone has the keys of LlamaForCausalLM."""
    if not eyes:
        return name if name.startswith("lm_head.") else f"model.{name.removeprefix('language_model.')}"
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    for stem, inner in (("language_model.", "model."), ("vision_tower.", "vision_model.")):
        if name.startswith(stem):
            return stem + inner + name.removeprefix(stem)
    return name


def hub_weights(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """By published key instead of pumice's name."""
    eyes = any(name.startswith("vision_tower.") for name in weights)
    return {hub_key(name, eyes=eyes): each for name, each in weights.items()}


# --- the files beside them --------------------------------------------------------------------------------------------


def put_descriptions(folder: Path, config: LlavaConfig, dtype: torch.dtype) -> None:
    """What the folder says of itself: config.json, and how images are prepared."""
    for name, content in _descriptions(config, DTYPE_NAMES[dtype]).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _descriptions(config: LlavaConfig, dtype: str) -> dict[str, dict[str, object]]:
    """File names and their content."""
    generation: dict[str, object] = {"eos_token_id": one_or_many(config.stop_ids)} if config.stop_ids else {}
    files: dict[str, dict[str, object]] = {"generation_config.json": generation}
    text = text_values(config.text, config.template) | {"torch_dtype": dtype}
    common: dict[str, object] = {"torch_dtype": dtype, TEMPLATE_KEY: config.template}
    if config.vision is None or config.image is None or config.projector is None:
        return files | {"config.json": text | common}
    tiles = config.image.mode == "anyres"
    model: dict[str, object] = {
        "model_type": "llava_next" if tiles else "llava",
        "architectures": ["LlavaNextForConditionalGeneration" if tiles else "LlavaForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision_values(config.vision),
        "image_token_index": config.image_token_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.projector.bias,
        "vision_feature_layer": one_or_many(config.vision.feature_layers),
        "vision_feature_select_strategy": "full" if config.vision.keep_class_token else "default",
        "image_seq_length": config.vision.tile_tokens,
        "tie_word_embeddings": config.text.tied_embeddings,
    }
    if tiles:
        model |= {"image_grid_pinpoints": _pairs(config.image), "use_image_newline_parameter": True}
    processor = "LlavaNextProcessor" if tiles else "LlavaProcessor"
    files["config.json"] = model | common
    files["preprocessor_config.json"] = preprocessor_values(config.image) | {"processor_class": processor}
    files["processor_config.json"] = {
        "processor_class": processor,
        "image_token": "<image>",
        "patch_size": config.vision.patch_px,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": model["vision_feature_select_strategy"],
    }
    return files


def text_values(text: TextConfig, template: str) -> dict[str, object]:
    """Llama and Mistral without a window are one function; the name matters to readers that know prompts by it."""
    mistral = text.window is not None or prompt.TEMPLATES[template].name == "mistral_instruct"
    kind, head = ("mistral", "Mistral") if mistral else ("llama", "Llama")
    if text.qkv_bias:
        kind, head = "qwen2", "Qwen2"
    values: dict[str, object] = {
        "model_type": kind,
        "architectures": [f"{head}ForCausalLM"],
        "vocab_size": text.vocab,
        "hidden_size": text.width,
        "intermediate_size": text.ffn_width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": text.norm_eps,
        "rope_theta": text.rotary.theta,
        "max_position_embeddings": text.max_positions,
        "tie_word_embeddings": text.tied_embeddings,
    }
    if scaling := _rope_scaling(text):
        values["rope_scaling"] = scaling
    return values | ({"sliding_window": text.window} if kind == "mistral" else {})


def _rope_scaling(text: TextConfig) -> dict[str, object]:
    """Divisors as Transformers' longrope, which takes any: one set for both lengths is the same at every length."""
    rotary = text.rotary
    if not rotary.divisors and rotary.magnitude == 1:
        return {}
    short = list(rotary.divisors or (1.0,) * (text.head_width // 2))
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": list(rotary.long_divisors) or short,
        "original_max_position_embeddings": rotary.switch or text.max_positions,
        "attention_factor": rotary.magnitude,
    }


def vision_values(vision: VisionConfig) -> dict[str, object]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": vision.ffn_width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "image_size": vision.image_px,
        "patch_size": vision.patch_px,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.norm_eps,
        "projection_dim": vision.width,
    }


def preprocessor_values(image: ImageConfig) -> dict[str, object]:
    kinds = {"crop": "CLIPImageProcessor", "pad": "LlavaImageProcessor", "anyres": "LlavaNextImageProcessor"}
    size = image.resize_px
    values: dict[str, object] = {
        "image_processor_type": kinds[image.mode],
        "size": {"shortest_edge": size} if isinstance(size, int) else {"height": size[0], "width": size[1]},
        "crop_size": {"height": image.crop_px, "width": image.crop_px},
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "rescale_factor": image.rescale,
        "resample": image.resample,
    }
    values |= {f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")}
    if image.mode != "crop":
        values["do_pad"] = True
    return values | ({"image_grid_pinpoints": _pairs(image)} if image.mode == "anyres" else {})


def _pairs(image: ImageConfig) -> list[list[int]]:
    return [list(pair) for pair in image.pinpoints]


def one_or_many(values: tuple[int, ...]) -> int | list[int]:
    """As a config.json has the ids of end tokens."""
    return values[0] if len(values) == 1 else list(values)


def _copy_tokenizer(folder: Path, tokenizer_files: Path, template: str) -> None:
    """The tokenizer, and the chat template beside it when it is the one that the model was made for."""
    for name in TOKENIZER_FILES:
        if (tokenizer_files / name).is_file():
            shutil.copyfile(tokenizer_files / name, folder / name)
    text = chat_template(tokenizer_files)
    if text is not None and template_for(text) == template:
        content = json.dumps({"chat_template": text}, indent=2) + "\n"
        (folder / "chat_template.json").write_text(content, encoding="utf-8")
