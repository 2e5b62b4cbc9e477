"""A checkpoint as a Hugging Face folder: the folder it came from, to the byte, where its small files came along; else
one that says the same in Transformers' words.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pumice.chat_template import template_for
from pumice.checkpoints import hf
from pumice.checkpoints.fields import Fields, json_if_there, read_json
from pumice.checkpoints.form import Checkpoint, expected_tensors
from pumice.checkpoints.gguf_file import open_gguf
from pumice.checkpoints.gguf_vocab import tokenizer_files
from pumice.checkpoints.gguf_vocab_writer import vocab_values
from pumice.checkpoints.hf_writer import DTYPE_NAMES, check_sayable, hub_key, main_dtype, put_descriptions, put_weights
from pumice.checkpoints.origin import Origin, as_folder, json_bytes, put_files
from pumice.checkpoints.recoded import FORMAT_OF, recoded
from pumice.checkpoints.report import Progress, Report, Written
from pumice.checkpoints.safetensors_writer import Weight
from pumice.checkpoints.sidefiles import TOKENIZER_FILES, chat_template
from pumice.checkpoints.whole import check_free, whole
from pumice.config import LlavaConfig
from pumice.errors import UserError
from pumice.prompt import IMAGE_MARK
from pumice.sentencepiece import USER_DEFINED
from pumice.tokenizer import Tokenizer

SHARD_BYTES = 5 * 2**30
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
    eyes = plan.config.vision is not None
    sizes = {hub_key(name, eyes=eyes): each.nbytes for name, each in plan.weights.items()}
    total, done = sum(sizes.values()), 0
    with as_folder(plan.words) as words, whole(folder, replace=force) as partial:
        check_sayable(plan.config, tokenizer_files=words)
        partial.mkdir()
        for key in put_weights(partial, plan.weights, SHARD_BYTES):
            done += sizes[key]
            progress(key, done, total)
        back = origin is not None and origin.format == "hf" and _put_back(partial, checkpoint, origin, dtype)
        if not back:
            put_files(partial, plan.words)
            put_descriptions(partial, plan.config, main_dtype(plan.weights))
            jinja = chat_template(words)
            if jinja is not None and template_for(jinja) == plan.config.template:
                (partial / "chat_template.json").write_bytes(json_bytes({"chat_template": jinja}))
    kinds = Counter(DTYPE_NAMES[each.dtype] for each in plan.weights.values())
    written = Written(folder, len(plan.weights), dict(kinds.most_common()), total)
    return Report((written,), (), () if back else tuple(notes))


def _put_back(folder: Path, checkpoint: Checkpoint, origin: Origin, dtype: torch.dtype | None) -> bool:
    """The small files of the source, if they still describe this model."""
    if "config.json" not in origin.files or _joined(origin):
        return False
    put_files(folder, origin.files)
    if dtype is not None:
        config = json.loads(origin.files["config.json"])
        (folder / "config.json").write_bytes(json_bytes(_retyped(config, DTYPE_NAMES[dtype])))
    try:
        same = hf.read(folder, read_json(folder / "config.json"), None).config == checkpoint.config
    except UserError:
        same = False
    if not same:
        for name in origin.files:
            (folder / name).unlink()
    return same


def _joined(origin: Origin) -> bool:
    """Does the source's config.json ask for Phi-3's joined matrices? What is written has them apart, as a Llama's."""
    config = Fields(json.loads(origin.files["config.json"]), "config.json")
    return "phi3" in (config.raw("model_type"), config.inner("text_config").raw("model_type"))


def _retyped(value: object, name: str) -> object:
    match value:
        case dict():
            return {
                key: name if key in ("torch_dtype", "dtype") and isinstance(each, str) else _retyped(each, name)
                for key, each in value.items()
            }
        case list():
            return [_retyped(each, name) for each in value]
    return value


# --- in Transformers' words -------------------------------------------------------------------------------------------


def _plan(checkpoint: Checkpoint, dtype: torch.dtype | None, origin: Origin | None, notes: list[str]) -> _Plan:
    config, words = checkpoint.config, _words(checkpoint, origin)
    if config.vision is None or config.image is None:
        return _Plan(config, words, _weights(checkpoint, config, dtype, origin))
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
    return _Plan(config, words, _weights(checkpoint, config, dtype, origin))


def _words(checkpoint: Checkpoint, origin: Origin | None) -> dict[str, bytes]:
    """The tokenizer's files: those of the source, or made from a GGUF's metadata."""
    home = checkpoint.home or checkpoint.path
    if checkpoint.format != "gguf":
        found = {path.name: path.read_bytes() for path in home.iterdir() if path.name in _WORDS and path.is_file()}
    else:
        found = {name: data for name, data in origin.files.items() if name in _WORDS} if origin else {}
    if "tokenizer.json" in found:
        return found
    if "tokenizer.model" in found:
        return found | _as_json(found)
    return {name: json_bytes(each) for name, each in tokenizer_files(open_gguf(checkpoint.path).fields).items()}


_WORDS = (*TOKENIZER_FILES, "chat_template.jinja", "chat_template.json")


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


def _weights(
    checkpoint: Checkpoint, config: LlavaConfig, dtype: torch.dtype | None, origin: Origin | None
) -> dict[str, Weight]:
    have = set(checkpoint.tensors.names())
    known = origin.dtypes if origin is not None and checkpoint.format == "gguf" else {}
    weights = {}
    for name, shape in expected_tensors(config).items():
        if name not in have:
            load = functools.partial(torch.ones if name.endswith("weight") else torch.zeros, shape)
            weights[name] = Weight(shape, dtype or torch.float32, load)
            continue
        own = torch.float16 if checkpoint.tensors.blocks(name) else checkpoint.tensors.dtype(name)
        chosen = dtype or known.get(name, own)
        weights[name] = Weight(shape, chosen, functools.partial(_loaded, checkpoint, name, chosen, shape[0]))
    return weights


def _loaded(checkpoint: Checkpoint, name: str, dtype: torch.dtype, rows: int) -> Tensor:
    """A tensor, with more rows where the vocabulary grew. The mean of all rows is never the best of them, so that no
    answer changes."""
    if dtype in FORMAT_OF:
        raw = recoded(name, checkpoint.tensors.stored(name), FORMAT_OF[dtype])
        values = torch.from_numpy(raw).view(dtype).view(checkpoint.tensors.shape(name))
    else:
        values = checkpoint.tensors[name]
    if len(values) == rows:
        return values
    mean = values.float().mean(dim=0, keepdim=True).to(values.dtype)
    return torch.cat((values, mean.expand(rows - len(values), -1)))
