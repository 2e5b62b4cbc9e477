"""What Ollama's `show` says of a model's files: the keys of its GGUF files, or the same keys made from a config.json.

No weights are read. Facts: Ollama's server/routes.go (GetModelInfo); ggml's docs/gguf.md; safetensors' README.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from pumice.config import TEXT_DEFAULTS
from pumice.store import gguf_keys
from pumice.store.blobs import open_regular
from pumice.store.gguf_keys import FILE_TYPES
from pumice.store.installed import Folder, Installed

_LEFT_OUT = ("general.name", "tokenizer.chat_template")
_MOST_HEADER_BYTES = 100 * 2**20
"""Of a safetensors file: its format's own bound."""
_EYES = ("vision_tower", "vision_model", "projector", "image_newline")
"""Parts of the names of tensors that are no language model's."""
DTYPES: Mapping[str, str] = MappingProxyType({"float32": "F32", "float16": "F16", "bfloat16": "BF16"})
"""What a config.json calls the type of its weights, and what Ollama does."""
_NUMBERS = {name: number for number, name in FILE_TYPES.items()}


def of_model(model: Installed, *, whole: bool = False) -> dict[str, object]:
    """By llama.cpp's keys. whole: with long arrays, such as a vocabulary, which are null otherwise.

    Raises UserError for weights that are not there whole, or are no GGUF file.
    """
    if isinstance(model, Folder):
        return _of_folder(model)
    paths = model.paths("model")
    if not paths:
        return {}
    said = gguf_keys.said(paths[0], model.title, whole=whole)
    kept = {key: value for key, value in said.values.items() if key not in _LEFT_OUT}
    return {"general.parameter_count": said.parameters} | kept


def of_eyes(model: Installed, *, whole: bool = False) -> dict[str, object] | None:
    """Of its projector; None for a model without eyes. Raises UserError."""
    if isinstance(model, Folder):
        return _eyes_of_folder(model)
    paths = model.paths("projector")
    if not paths:
        return None
    said = gguf_keys.said(paths[0], model.title, whole=whole)
    return {"general.parameter_count": said.parameters} | dict(said.values)


def tensors(model: Installed) -> list[dict[str, object]]:
    """Name, type and shape of each of the language model's tensors, for a verbose `show`; none of a folder's.

    Raises UserError.
    """
    if isinstance(model, Folder):
        return []
    every = (gguf_keys.said(path, model.title).tensors for path in model.paths("model"))
    return [{"name": name, "type": kind, "shape": list(shape)} for each in every for name, kind, shape in each]


def text_settings(model: Folder) -> Mapping[str, object]:
    """What a config.json says of the language model: Transformers' text_config, or the whole of the authors'."""
    inner = model.config.get("text_config")
    return inner if isinstance(inner, dict) else {} if sees_by_parts(model) else model.config


def sees_by_parts(model: Folder) -> bool:
    """Is this Transformers' LLaVA, whose parts have configs of their own?"""
    return "vision_config" in model.config or "text_config" in model.config


def language_model(model: Folder) -> str:
    """Its kind: llama, mistral, qwen2 or phi3; whatever an embedding model says."""
    named = text_settings(model).get("model_type")
    if model.embeds:
        return named if isinstance(named, str) else "unknown"
    return named if isinstance(named, str) and named in TEXT_DEFAULTS else _AUTHORS.get(str(named), "llama")


_AUTHORS = {"llava_mistral": "mistral"}
"""What the authors' model_type says of the language model, where that is no Llama."""


def parameters(model: Folder) -> int:
    """How many numbers the language model has, from the heads of its safetensors files; 0 for other files."""
    counts = (_counted(each, each.stat().st_mtime_ns) for each in sorted(model.path.glob("*.safetensors")))
    return sum(counts)


@lru_cache(maxsize=256)
def _counted(path: Path, modified_ns: int) -> int:
    """A file that changes is counted anew. 0 for one that is damaged: this is for lists, and loading says more."""
    try:
        # The Hub's cache is made of links.
        with open_regular(path.resolve()) as file:
            length = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(length)) if length <= _MOST_HEADER_BYTES else {}
        return sum(
            math.prod(each["shape"])
            for name, each in head.items()
            if name != "__metadata__" and not any(part in name for part in _EYES)
        )
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return 0


def _of_folder(model: Folder) -> dict[str, object]:
    said, kind = text_settings(model), language_model(model)
    architecture = "llama" if kind == "mistral" else kind
    count = parameters(model)
    dtype = model.config.get("dtype") or model.config.get("torch_dtype")
    file_type = _NUMBERS.get(DTYPES.get(str(dtype), ""))
    found = _of_encoder(said) if model.embeds else _of_language_model(said, kind)
    general = {"architecture": architecture, "parameter_count": count or None, "file_type": file_type}
    return {f"general.{key}": value for key, value in general.items() if value is not None} | {
        f"{architecture}.{key}": value for key, value in found.items() if isinstance(value, int | float)
    }


def _of_encoder(said: Mapping[str, object]) -> dict[str, object]:
    """Of an embedding model, whose kinds are many: what it says itself."""
    return {
        "context_length": said.get("max_position_embeddings"),
        "embedding_length": said.get("hidden_size"),
        "block_count": said.get("num_hidden_layers"),
        "feed_forward_length": said.get("intermediate_size"),
        "attention.head_count": said.get("num_attention_heads"),
        "vocab_size": said.get("vocab_size"),
    }


def _of_language_model(said: Mapping[str, object], kind: str) -> dict[str, object]:
    usual = TEXT_DEFAULTS[kind]
    heads = said.get("num_attention_heads", usual.heads)
    return {
        "context_length": said.get("max_position_embeddings", usual.max_positions),
        "embedding_length": said.get("hidden_size", usual.width),
        "block_count": said.get("num_hidden_layers", usual.layers),
        "feed_forward_length": said.get("intermediate_size", usual.ffn_width),
        "attention.head_count": heads,
        "attention.head_count_kv": said.get("num_key_value_heads", usual.kv_heads or heads),
        "attention.layer_norm_rms_epsilon": said.get("rms_norm_eps", usual.norm_eps),
        "rope.freq_base": _theta(said),
        "vocab_size": said.get("vocab_size", usual.vocab),
    }


def _theta(said: Mapping[str, object]) -> object:
    """Transformers 5 keeps it with the other settings of rotary embeddings."""
    inner = said.get("rope_parameters")
    return said.get("rope_theta", inner.get("rope_theta", 1e4) if isinstance(inner, dict) else 1e4)


def _eyes_of_folder(model: Folder) -> dict[str, object] | None:
    inner = model.config.get("vision_config")
    if not isinstance(inner, dict):
        return None
    keys = {
        "image_size": "image_size",
        "patch_size": "patch_size",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "block_count": "num_hidden_layers",
        "attention.head_count": "num_attention_heads",
    }
    found = {f"clip.vision.{key}": inner[name] for key, name in keys.items() if isinstance(inner.get(name), int)}
    return {"general.architecture": "clip", "clip.has_vision_encoder": True, **found}
