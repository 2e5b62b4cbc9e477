"""Random GGUF models of LLaVA's shapes: a language model in a mix of formats, and the projector file beside it.

Speed does not depend on what the weights say, as long as no number is infinite: bytes are drawn, and only the scales
are set so that a row's product has about the size of its input. The projector is written in the first converters'
naming, of which nearly all public files are: 23 of CLIP's 24 blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pumice import quant
from pumice.checkpoints.gguf_file import ToStore, Value, stored_bytes, write_gguf
from pumice.config import TextConfig, VisionConfig
from pumice.quant import FORMATS

CLIP_L = VisionConfig(image_px=336, patch_px=14, width=1024, layers=24, heads=16, ffn_width=4096)
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PINPOINTS = [336, 672, 672, 336, 672, 672, 1008, 336, 336, 1008]
"""LLaVA 1.6's canvases, (width, height) pairs in one row."""


@dataclass(frozen=True)
class Shape:
    text: TextConfig
    vision: VisionConfig


SHAPES = {
    "7b": Shape(TextConfig(32000, 4096, 32, 32, 32, 128, 11008), CLIP_L),
    "1.1b": Shape(TextConfig(32000, 2048, 22, 32, 4, 64, 5632), CLIP_L),
    "tiny": Shape(TextConfig(512, 256, 2, 4, 2, 64, 512), VisionConfig(336, 14, 64, 3, 4, 128)),
}
"""Vicuna 7B, TinyLlama, and one for tests."""
SCALES = {
    "Q4_0": {0: 1.0},
    "Q8_0": {0: 1.0},
    "Q4_K": {0: 1.0, 2: 7.5},
    "Q5_K": {0: 1.0, 2: 15.5},
    "Q6_K": {208: 1.0},
}
"""Where a block has its half-precision scales, and how large they are beside each other: mins cancel the mean."""
MIXES = {
    "q4_0": ("Q4_0", "Q4_0", "Q6_K"),
    "q8_0": ("Q8_0", "Q8_0", "Q8_0"),
    "q4_k_m": ("Q4_K", "Q6_K", "Q6_K"),
    "q5_k_m": ("Q5_K", "Q6_K", "Q6_K"),
    "q6_k": ("Q6_K", "Q6_K", "Q6_K"),
    "f16": ("F16", "F16", "F16"),
}
"""The format of most matrices, of the values and down projections of half of the blocks, and of the head."""


FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "f16": 1}
"""llama.cpp's number of each mix, which OpenVINO asks for."""


def files(folder: Path, shape: str, mix: str, *, tiled: bool) -> tuple[Path, Path]:
    """The language model and the projector (LLaVA 1.6's if `tiled`, else 1.5's), made where they are not there yet."""
    model, eyes = folder / f"{shape}-{mix}.gguf", folder / f"{shape}-mmproj-{'1.6' if tiled else '1.5'}.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        _written(model, _text_keys(SHAPES[shape].text, mix), _text_tensors(SHAPES[shape].text, mix))
    if not eyes.exists():
        _written(eyes, _eyes_keys(SHAPES[shape].vision, tiled), _eyes_tensors(SHAPES[shape], tiled))
    return model, eyes


def with_byte_levels(folder: Path, shape: str, mix: str) -> Path:
    """The language model with the one kind of vocabulary that OpenVINO reads from a GGUF file, byte-level BPE."""
    path = folder / f"{shape}-{mix}-bpe.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        text = SHAPES[shape].text
        _written(path, _text_keys(text, mix) | _byte_levels(text.vocab), _text_tensors(text, mix))
    return path


def _written(path: Path, keys: dict[str, Value], tensors: Iterator[tuple[str, tuple[int, ...], str]]) -> None:
    random = np.random.default_rng(0)
    to_store = [
        ToStore(name, sizes, FORMATS[format], functools.partial(_drawn, name, sizes, format, random))
        for name, sizes, format in tensors
    ]
    for _ in write_gguf(path, keys, to_store):
        pass


def _drawn(name: str, sizes: tuple[int, ...], format: str, random: np.random.Generator) -> np.ndarray[Any, Any]:
    if name.endswith(("norm.weight", "ln.weight", "ln1.weight", "ln2.weight")):
        return np.ones(sizes, np.float32)
    spread = float(np.prod(sizes[1:])) ** -0.5 if len(sizes) > 1 else 0.02
    if FORMATS[format].dtype is not None:
        drawn = random.standard_normal(sizes, np.float32) * np.float32(spread)
        return drawn.astype(np.float16) if format == "F16" else drawn
    blocks_NB = np.frombuffer(random.bytes(stored_bytes(sizes, FORMATS[format])), np.uint8).copy()
    blocks_NB = blocks_NB.reshape(-1, FORMATS[format].block_bytes)
    _set_scales(blocks_NB, format, 1.0)
    sample = quant.unpack(torch.from_numpy(blocks_NB[:1000]), FORMATS[format])
    _set_scales(blocks_NB, format, spread / float(sample.std()))
    return blocks_NB


def _set_scales(blocks_NB: np.ndarray[Any, Any], format: str, scale: float) -> None:
    for at, relative in SCALES[format].items():
        blocks_NB[:, at : at + 2] = np.frombuffer(np.float16(scale * relative).tobytes(), np.uint8)


# --- language model ---------------------------------------------------------------------------------------------------


def _more_bits(layer: int, layers: int) -> bool:
    """llama-quantize gives some matrices of these blocks more bits in the mixes called M (llama-quant.cpp)."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _text_tensors(text: TextConfig, mix: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    base, raised, head = MIXES[mix]
    width, shared = text.width, text.kv_heads * text.head_width
    yield "token_embd.weight", (text.vocab, width), base
    for layer in range(text.layers):
        more = raised if _more_bits(layer, text.layers) else base
        yield f"blk.{layer}.attn_norm.weight", (width,), "F32"
        yield f"blk.{layer}.attn_q.weight", (text.heads * text.head_width, width), base
        yield f"blk.{layer}.attn_k.weight", (shared, width), base
        yield f"blk.{layer}.attn_v.weight", (shared, width), more
        yield f"blk.{layer}.attn_output.weight", (width, text.heads * text.head_width), base
        yield f"blk.{layer}.ffn_norm.weight", (width,), "F32"
        yield f"blk.{layer}.ffn_gate.weight", (text.ffn_width, width), base
        yield f"blk.{layer}.ffn_up.weight", (text.ffn_width, width), base
        yield f"blk.{layer}.ffn_down.weight", (width, text.ffn_width), more
    yield "output_norm.weight", (width,), "F32"
    yield "output.weight", (text.vocab, width), head


def tensor_bytes(text: TextConfig, mix: str) -> dict[str, int]:
    """What each tensor of a language model takes."""
    return {name: stored_bytes(sizes, FORMATS[format]) for name, sizes, format in _text_tensors(text, mix)}


def read_bytes(shape: Shape, mix: str) -> int:
    """Weights that a decode step reads: all but the table of embeddings."""
    sizes = tensor_bytes(shape.text, mix)
    return sum(sizes.values()) - sizes["token_embd.weight"]


def _text_keys(text: TextConfig, mix: str) -> dict[str, Value]:
    numbers = {
        "context_length": text.max_positions, "embedding_length": text.width, "block_count": text.layers,
        "feed_forward_length": text.ffn_width, "attention.head_count": text.heads,
        "attention.head_count_kv": text.kv_heads, "rope.dimension_count": text.head_width, "vocab_size": text.vocab,
    }  # fmt: skip
    keys = {"general.architecture": Value("string", "llama")}
    keys |= {f"llama.{name}": Value("u32", number) for name, number in numbers.items()}
    keys["llama.attention.layer_norm_rms_epsilon"] = Value("f32", text.norm_eps)
    pieces, kinds = _vocabulary(text.vocab)
    roles = {"bos": 1, "eos": 2, "unknown": 0}
    keys |= {f"tokenizer.ggml.{role}_token_id": Value("u32", id) for role, id in roles.items()}
    return keys | {
        "general.quantization_version": Value("u32", 2),
        "general.file_type": Value("u32", FILE_TYPES[mix]),
        "tokenizer.ggml.model": Value("string", "llama"),
        "tokenizer.ggml.tokens": Value("string", pieces),
        "tokenizer.ggml.scores": Value("f32", [-float(id) for id in range(text.vocab)]),
        "tokenizer.ggml.token_type": Value("i32", kinds),
    }


def _vocabulary(rows: int) -> tuple[list[str], list[int]]:
    """Sentencepiece's: unknown, begin, end, the 256 bytes, printable characters, then words that no text has."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (rows - 259)]
    return pieces + [f"<word {id}>" for id in range(len(pieces), rows)], kinds


def _byte_levels(rows: int) -> dict[str, Value]:
    """Byte-level BPE: the end, printable characters for bytes, one merge, then words that no text has."""
    pieces = ["<end>", *map(chr, range(33, 127)), "to"]
    kinds = [3, *[1] * (rows - 1)]
    return {f"tokenizer.ggml.{role}_token_id": Value("u32", 0) for role in ("bos", "eos", "unknown")} | {
        "tokenizer.ggml.model": Value("string", "gpt2"),
        "tokenizer.ggml.pre": Value("string", "llama-bpe"),
        "tokenizer.ggml.tokens": Value("string", pieces + [f"<word{id}>" for id in range(len(pieces), rows)]),
        "tokenizer.ggml.token_type": Value("i32", kinds),
        "tokenizer.ggml.merges": Value("string", ["t o"]),
    }


# --- projector --------------------------------------------------------------------------------------------------------


def _eyes_tensors(shape: Shape, tiled: bool) -> Iterator[tuple[str, tuple[int, ...], str]]:
    vision, out = shape.vision, shape.text.width
    width, ffn = vision.width, vision.ffn_width
    yield "v.class_embd", (width,), "F32"
    yield "v.patch_embd.weight", (width, 3, vision.patch_px, vision.patch_px), "F16"
    yield "v.position_embd.weight", (vision.positions, width), "F16"
    # `ffn_down` is the first layer of the MLP in this naming.
    matrices = {f"attn_{part}": (width, width) for part in ("q", "k", "v", "out")}
    matrices |= {"ffn_down": (ffn, width), "ffn_up": (width, ffn)}
    norms = ["v.pre_ln"]
    for layer in range(vision.layers - 1):
        norms += [f"v.blk.{layer}.ln1", f"v.blk.{layer}.ln2"]
        for name, sizes in matrices.items():
            yield f"v.blk.{layer}.{name}.weight", sizes, "F16"
            yield f"v.blk.{layer}.{name}.bias", sizes[:1], "F32"
    for name in norms:
        yield f"{name}.weight", (width,), "F32"
        yield f"{name}.bias", (width,), "F32"
    for name, columns in (("mm.0", width), ("mm.2", out)):
        yield f"{name}.weight", (out, columns), "F16"
        yield f"{name}.bias", (out,), "F32"
    if tiled:
        yield "model.image_newline", (out,), "F32"


def _eyes_keys(vision: VisionConfig, tiled: bool) -> dict[str, Value]:
    numbers = {
        "image_size": vision.image_px, "patch_size": vision.patch_px, "embedding_length": vision.width,
        "feed_forward_length": vision.ffn_width, "projection_dim": 768, "block_count": vision.layers - 1,
        "attention.head_count": vision.heads,
    }  # fmt: skip
    keys = {f"clip.vision.{name}": Value("u32", number) for name, number in numbers.items()}
    if tiled:
        keys["clip.vision.image_grid_pinpoints"] = Value("i32", PINPOINTS)
    return keys | {
        "general.architecture": Value("string", "clip"),
        "clip.has_text_encoder": Value("bool", False),
        "clip.has_vision_encoder": Value("bool", True),
        "clip.has_llava_projector": Value("bool", True),
        "clip.projector_type": Value("string", "mlp"),
        "clip.use_gelu": Value("bool", False),
        "clip.vision.attention.layer_norm_epsilon": Value("f32", vision.norm_eps),
        "clip.vision.image_mean": Value("f32", CLIP_MEAN),
        "clip.vision.image_std": Value("f32", CLIP_STD),
    }
