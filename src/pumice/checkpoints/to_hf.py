"""A checkpoint as a Hugging Face folder: the folder it came from, to the byte, where its small files came along; else
one that says the same in Transformers' words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pumice.chat_template import template_for
from pumice.checkpoints import hf
from pumice.checkpoints.fields import Fields, json_if_there, read_json
from pumice.checkpoints.folder import put_weights, weights_of, words_of, written
from pumice.checkpoints.form import Checkpoint
from pumice.checkpoints.gguf_vocab import tokenizer_files
from pumice.checkpoints.gguf_vocab_writer import vocab_values
from pumice.checkpoints.hf_writer import check_sayable, hub_weights, put_descriptions
from pumice.checkpoints.origin import Origin, as_folder, files_of, json_bytes, put_files, put_source, retyped
from pumice.checkpoints.report import Progress, Report
from pumice.checkpoints.safetensors_writer import Weight, main_dtype
from pumice.checkpoints.sidefiles import chat_template
from pumice.checkpoints.whole import check_free, whole
from pumice.config import LlavaConfig
from pumice.errors import UserError
from pumice.prompt import IMAGE_MARK
from pumice.sentencepiece import USER_DEFINED
from pumice.tokenizer import Tokenizer

ROWS_IN_STEPS_OF = 64
"""A vocabulary that grows gets so many rows at least, as the published folders have it."""


@dataclass(frozen=True)
class _Plan:
    """What the folder will hold."""

    config: LlavaConfig
    words: Mapping[str, bytes]
    """The tokenizer's files."""
    weights: Mapping[str, Weight]


def write_folder(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: torch.dtype | None,
    origin: Origin | None,
    *,
    force: bool,
    progress: Progress,
) -> Report:
    """A new folder, which appears whole or not at all. `dtype`: of all weights; None takes those of the folder that a
    GGUF was made from, or the file's own with F16 for what is in blocks.

    Raises UserError: a folder that is there already; a model that Transformers' classes cannot express; a full disk.
    """
    check_free(folder, replace=force)
    notes: list[str] = []
    plan = _plan(checkpoint, dtype, origin, notes)
    weights = hub_weights(plan.weights)
    with as_folder(plan.words) as words, whole(folder, replace=force) as partial:
        check_sayable(plan.config, tokenizer_files=words)
        partial.mkdir()
        put_weights(partial, weights, progress)
        back = _put_back(partial, plan.config, files_of(origin, "hf"), dtype)
        if not back:
            put_files(partial, plan.words)
            put_descriptions(partial, plan.config, main_dtype(weights))
            jinja = chat_template(words)
            if jinja is not None and template_for(jinja) == plan.config.template:
                (partial / "chat_template.json").write_bytes(json_bytes({"chat_template": jinja}))
            if origin is not None:
                put_source(partial, "hf", origin, dtype)
    return Report((written(folder, weights),), (), () if back else tuple(notes))


def _put_back(folder: Path, config: LlavaConfig, files: Mapping[str, bytes], dtype: torch.dtype | None) -> bool:
    """The small files of the folder that this model was, if they still describe it."""
    if "config.json" not in files or _joined(files["config.json"]):
        return False
    put_files(folder, files)
    if dtype is not None:
        (folder / "config.json").write_bytes(retyped(files["config.json"], dtype))
    try:
        same = hf.read(folder, read_json(folder / "config.json"), None).config == config
    except UserError:
        same = False
    if not same:
        for name in files:
            (folder / name).unlink()
    return same


def _joined(config: bytes) -> bool:
    """Does the source's config.json ask for Phi-3's joined matrices? What is written has them apart, as a Llama's."""
    fields = Fields(json.loads(config), "config.json")
    return "phi3" in (fields.raw("model_type"), fields.inner("text_config").raw("model_type"))


# --- in Transformers' words -------------------------------------------------------------------------------------------


def _plan(checkpoint: Checkpoint, dtype: torch.dtype | None, origin: Origin | None, notes: list[str]) -> _Plan:
    config, words = checkpoint.config, _words(checkpoint, origin)
    if config.vision is None or config.image is None:
        return _Plan(config, words, weights_of(checkpoint, config, dtype, origin))
    vision, picture = config.vision, config.image
    if picture.mode == "anyres" and not picture.rounds_unpad:
        notes.append("padding is cut off as Transformers does it; in rare sizes the authors keep a row more or less")
    if not vision.post_norm:
        notes.append("the tower came without its last norm, which no feature passes; the folder has one without effect")
    config = replace(config, vision=replace(vision, post_norm=True), image=replace(picture, rules="hf"))
    image = checkpoint.tokenizer.id_of(IMAGE_MARK)
    if image is not None and image < config.text.vocab:
        config = replace(config, image_token_id=image)
    else:
        config, words = _with_image_token(config, words, notes)
    return _Plan(config, words, weights_of(checkpoint, config, dtype, origin))


def _words(checkpoint: Checkpoint, origin: Origin | None) -> dict[str, bytes]:
    """The tokenizer's files, a tokenizer.json among them where one can say the same as tokenizer.model."""
    found = words_of(checkpoint, origin)
    return found if "tokenizer.json" in found else found | _as_json(found)


def _as_json(words: Mapping[str, bytes]) -> dict[str, bytes]:
    """The tokenizer.json of a tokenizer.model: Transformers 5 makes one of its own, without the space in front of a
    text. Where one cannot say the same, there is none."""
    with as_folder(words) as folder:
        if json_if_there(folder / "tokenizer_config.json").raw("legacy") is False:
            return {}
        tokenizer = Tokenizer.from_folder(folder)
        values, _ = vocab_values(folder, tokenizer, tokenizer.vocab_size, ())
    if USER_DEFINED in values["tokenizer.ggml.token_type"].value:
        return {}
    fields = Fields({key: each.value for key, each in values.items()}, "tokenizer.model")
    return {"tokenizer.json": json_bytes(tokenizer_files(fields)["tokenizer.json"])}


def _with_image_token(
    config: LlavaConfig, words: Mapping[str, bytes], notes: list[str]
) -> tuple[LlavaConfig, dict[str, bytes]]:
    """A token for an image, behind all others; rows of the embedding are added where none is free."""
    with as_folder(words) as folder:
        id = Tokenizer.from_folder(folder).vocab_size
    rows = config.text.vocab
    if id >= rows:
        rows = -(-(id + 1) // ROWS_IN_STEPS_OF) * ROWS_IN_STEPS_OF
        notes.append(
            f"the vocabulary grew from {config.text.vocab} to {rows} rows; the new ones hold the mean of the old"
        )
    notes.append(f"{IMAGE_MARK} became token {id}; the source has none for an image")
    token = {"content": IMAGE_MARK, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    token["special"] = True
    found = dict(words)
    if "tokenizer.json" in found:
        spec = json.loads(found["tokenizer.json"])
        spec["added_tokens"] = [*(spec.get("added_tokens") or ()), {"id": id, **token}]
        found["tokenizer.json"] = json_bytes(spec)
    settings = json.loads(found.get("tokenizer_config.json", b"{}"))
    settings["added_tokens_decoder"] = {**(settings.get("added_tokens_decoder") or {}), str(id): token}
    found["tokenizer_config.json"] = json_bytes(settings)
    return replace(config, image_token_id=id, text=replace(config.text, vocab=rows)), found
