"""A language model as GGUF's metadata and tensors; the inverse of `gguf`.

Facts: convert_hf_to_gguf.py, llama-quantize, gguf-py's constants.py.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pumice.checkpoints.form import Checkpoint
from pumice.checkpoints.gguf import IN_BLOCK, LLAMA_3, LONG_ROPE, MODEL_KEY, NAMES
from pumice.checkpoints.gguf_file import ToStore, Value
from pumice.checkpoints.gguf_vocab import names_phi_3
from pumice.checkpoints.mixes import MIXES, Mix, format_of
from pumice.checkpoints.recoded import FORMAT_OF, recoded
from pumice.checkpoints.tensors import Tensors
from pumice.config import LlavaConfig, Rotary, TextConfig
from pumice.quant import FORMATS, Format, QTensor, heads_turned

EYES = ("vision_tower.", "multi_modal_projector.", "image_newline")
"""How the names of a projector file's tensors begin."""

_KEYS = {name: key for key, name in NAMES.items()}
_KEYS_IN_BLOCK = {name: key for key, name in IN_BLOCK.items()}


def key_of(name: str) -> str:
    """The name in a file of a language model's tensor, by pumice's name."""
    stem, _, part = name.rpartition(".")
    if stem in _KEYS:
        return f"{_KEYS[stem]}.{part}"
    match = re.fullmatch(r"language_model\.layers\.(\d+)\.(.+)", stem)
    assert match is not None, name
    return f"blk.{match[1]}.{_KEYS_IN_BLOCK[match[2]]}.{part}"


def stored_format(tensors: Tensors, name: str) -> Format:
    """The format that keeps a tensor's values as they are; float64 has none and becomes F32."""
    return tensors.blocks(name) or FORMAT_OF.get(tensors.dtype(name), FORMATS["F32"])


def lm_formats(checkpoint: Checkpoint, mix: Mix | None) -> dict[str, Format]:
    """What each tensor of the language model is stored as, by pumice's names, in the order of the file: what stands
    outside of the blocks first, then block by block, each by name. Vectors are F32, as llama.cpp asks for."""
    tensors, text = checkpoint.tensors, checkpoint.config.text
    names = sorted((name for name in tensors.names() if not name.startswith(EYES)), key=_place)
    formats = {}
    for name in names:
        shape = tensors.shape(name)
        if len(shape) == 1:
            formats[name] = FORMATS["F32"]
        elif mix is not None:
            formats[name] = format_of(key_of(name), shape[1], mix, text)
        else:
            formats[name] = stored_format(tensors, name)
    return formats


def _place(name: str) -> tuple[int, str]:
    key = key_of(name)
    match = re.match(r"blk\.(\d+)\.", key)
    return (int(match[1]) if match else -1), key


def lm_tensors(checkpoint: Checkpoint, formats: Mapping[str, Format]) -> list[ToStore]:
    stored = [
        ToStore(
            key_of(name), checkpoint.tensors.shape(name), format, functools.partial(_load, checkpoint, name, format)
        )
        for name, format in formats.items()
    ]
    return [*_rotary_tensors(checkpoint.config.text.rotary), *stored]


def _rotary_tensors(rotary: Rotary) -> list[ToStore]:
    """Divisors of the frequencies, where they are not one number; both of llama.cpp's ways go with its Llama."""
    sets = {LLAMA_3: rotary.divisors} if len(set(rotary.divisors)) > 1 else {}
    if rotary.long_divisors:
        short = rotary.divisors or (1.0,) * len(rotary.long_divisors)
        sets = dict(zip(LONG_ROPE, (short, rotary.long_divisors), strict=True))
    return [
        ToStore(name, (len(each),), FORMATS["F32"], functools.partial(np.array, each, np.float32))
        for name, each in sets.items()
    ]


def _load(checkpoint: Checkpoint, name: str, format: Format) -> np.ndarray[Any, Any]:
    values, text = checkpoint.tensors.stored(name), checkpoint.config.text
    if re.search(r"\.self_attn\.[qk]_proj\.", name):
        values = _in_llama_cpp_order(values, text.head_width)
    return recoded(name, values, format)


def _in_llama_cpp_order(values: Tensor | QTensor, head_width: int) -> Tensor | QTensor:
    if isinstance(values, Tensor):
        return values[heads_turned(len(values), head_width).argsort()]
    if values.head_width:
        return replace(values, head_width=0)
    return replace(values, data_RB=values.data_RB[heads_turned(values.shape[0], head_width).argsort()])


def lm_values(config: LlavaConfig, name: str) -> dict[str, Value]:
    """The metadata of a language model, but for its tokenizer and its types."""
    text = config.text
    own: dict[str, object] = {"template": config.template, "stop_ids": list(config.stop_ids)}
    if text.window is not None:
        own["window"] = text.window
    if config.vision is not None:
        own["image_token_id"] = config.image_token_id
    if config.template == "phi3" and not names_phi_3(name):
        name = f"phi-3 {name}"  # by which llama.cpp knows that its special tokens take the white space behind them
    return {
        "general.architecture": Value("string", "llama"),
        "general.type": Value("string", "model"),
        "general.name": Value("string", name),
        **_numbers(text),
        **_rotary_values(text.rotary),
        MODEL_KEY: Value("string", json.dumps(own)),
    }


def _numbers(text: TextConfig) -> dict[str, Value]:
    counts = {
        "vocab_size": text.vocab,
        "context_length": text.max_positions,
        "embedding_length": text.width,
        "block_count": text.layers,
        "feed_forward_length": text.ffn_width,
        "attention.head_count": text.heads,
        "attention.head_count_kv": text.kv_heads,
        "attention.key_length": text.head_width,
        "attention.value_length": text.head_width,
        "rope.dimension_count": text.head_width,
    }
    numbers = {"attention.layer_norm_rms_epsilon": text.norm_eps, "rope.freq_base": text.rotary.theta}
    return {f"llama.{key}": Value("u32", count) for key, count in counts.items()} | {
        f"llama.{key}": Value("f32", number) for key, number in numbers.items()
    }


def _rotary_values(rotary: Rotary) -> dict[str, Value]:
    values = {}
    if rotary.long_divisors:
        assert rotary.switch is not None, "long divisors come with a switch"
        values = {"type": Value("string", "longrope"), "original_context_length": Value("u32", rotary.switch)}
    elif len(set(rotary.divisors)) == 1:
        values = {"type": Value("string", "linear"), "factor": Value("f32", rotary.divisors[0])}
    if rotary.magnitude != 1:
        values["attn_factor"] = Value("f32", rotary.magnitude)
    return {f"llama.rope.scaling.{key}": each for key, each in values.items()}


def type_values(formats: Mapping[str, Format], mix: Mix | None, sizes: Mapping[str, int]) -> dict[str, Value]:
    """What the file says of its types as a whole. Without a mix: the type of the largest part."""
    main = max(formats, key=lambda name: sizes[name])
    usual = {each.base: each.file_type for each in MIXES.values()}
    number = mix.file_type if mix else usual.get(formats[main])
    values = {} if number is None else {"general.file_type": Value("u32", number)}
    if any(each.dtype is None for each in formats.values()):
        values["general.quantization_version"] = Value("u32", 2)
    return values


def dtypes(checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """The types that the weights have in the folder: of a GGUF, in the one it was made from, where it says."""
    if checkpoint.format == "gguf":
        return dict(checkpoint.origin.dtypes) if checkpoint.origin else {}
    return {name: checkpoint.tensors.dtype(name) for name in checkpoint.tensors.names()}
