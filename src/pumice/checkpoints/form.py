"""The one form that every checkpoint takes in memory: a config, a tokenizer, and tensors under pumice's own names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pumice.checkpoints.origin import Origin
from pumice.checkpoints.tensors import Entry, Tensors, listed
from pumice.config import LlavaConfig, ProjectorConfig, TextConfig, VisionConfig
from pumice.errors import UserError
from pumice.tokenizer import Tokenizer

Shape = tuple[int, ...]

COMPUTED = (".rotary_emb.inv_freq", ".embeddings.position_ids")
"""Tensors that a config says already; files from before Transformers 4.31 still hold them."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read: its files agree with each other and with what pumice expects."""

    path: Path
    format: Literal["hf", "original", "gguf"]
    config: LlavaConfig
    tokenizer: Tokenizer
    tensors: Tensors
    home: Path | None = None
    """The folder with the tokenizer, where that is another than `path`."""
    projector: Path | None = None
    """The file with the eyes of a GGUF."""
    origin: Origin | None = None
    """What a GGUF file knows of the folder it was made from."""


def expected_tensors(config: LlavaConfig) -> dict[str, Shape]:
    """The name and shape of every tensor of a network of this config: those of its modules, and no others."""
    expected: dict[str, Shape] = {}
    if config.vision is not None and config.projector is not None:
        expected |= expected_eyes(config.vision, config.projector, config.text.width, newline=config.has_newline)
    expected.update(_text(config.text))
    if not config.text.tied_embeddings:
        expected["lm_head.weight"] = (config.text.vocab, config.text.width)
    return expected


def expected_eyes(
    vision: VisionConfig, projector: ProjectorConfig, width_out: int, *, newline: bool
) -> dict[str, Shape]:
    """Of the tower, the projector and the newline vector alone."""
    expected = dict(_vision(vision)) | dict(_projector(projector, vision.feature_width, width_out))
    return expected | ({"image_newline": (width_out,)} if newline else {})


def _vision(vision: VisionConfig) -> Iterator[tuple[str, Shape]]:
    width, ffn, tower = vision.width, vision.ffn_width, "vision_tower"
    yield f"{tower}.embeddings.class_embedding", (width,)
    yield f"{tower}.embeddings.patch_embedding.weight", (width, 3, vision.patch_px, vision.patch_px)
    yield f"{tower}.embeddings.position_embedding.weight", (vision.positions, width)
    yield from _linear(f"{tower}.pre_layrnorm", (width,))
    for index in range(vision.layers):
        block = f"{tower}.encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{block}.self_attn.{name}", (width, width))
        yield from _linear(f"{block}.layer_norm1", (width,))
        yield from _linear(f"{block}.mlp.fc1", (ffn, width))
        yield from _linear(f"{block}.mlp.fc2", (width, ffn))
        yield from _linear(f"{block}.layer_norm2", (width,))
    if vision.post_norm:
        yield from _linear(f"{tower}.post_layernorm", (width,))


def _projector(projector: ProjectorConfig, width_in: int, width_out: int) -> Iterator[tuple[str, Shape]]:
    for index in range(1, projector.layers + 1):
        shape = (width_out, width_in if index == 1 else width_out)
        yield from _linear(f"multi_modal_projector.linear_{index}", shape, bias=projector.bias)


def _text(text: TextConfig) -> Iterator[tuple[str, Shape]]:
    width, inner, shared = text.width, text.heads * text.head_width, text.kv_heads * text.head_width
    yield "language_model.embed_tokens.weight", (text.vocab, width)
    for index in range(text.layers):
        block = f"language_model.layers.{index}"
        yield from _linear(f"{block}.self_attn.q_proj", (inner, width), bias=text.qkv_bias)
        yield from _linear(f"{block}.self_attn.k_proj", (shared, width), bias=text.qkv_bias)
        yield from _linear(f"{block}.self_attn.v_proj", (shared, width), bias=text.qkv_bias)
        yield from _linear(f"{block}.self_attn.o_proj", (width, inner), bias=False)
        yield from _linear(f"{block}.mlp.gate_proj", (text.ffn_width, width), bias=False)
        yield from _linear(f"{block}.mlp.up_proj", (text.ffn_width, width), bias=False)
        yield from _linear(f"{block}.mlp.down_proj", (width, text.ffn_width), bias=False)
        yield f"{block}.input_layernorm.weight", (width,)
        yield f"{block}.post_attention_layernorm.weight", (width,)
    yield "language_model.norm.weight", (width,)


def _linear(name: str, shape: Shape, *, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def renamed(entries: Mapping[str, Entry], path: Path) -> dict[str, Entry]:
    """A file's tensors under pumice's names, whatever layout the file has; leftovers of old writers are dropped.

    Layouts: the published folders and Transformers up to 4.51 (`language_model.model…`, `vision_tower.vision_model…`);
    4.52 to 4.x (a leading `model.`); 5 (no `vision_model`); a language model alone (`model.layers…`); the authors'
    (`model.mm_projector.0`, `model.vision_tower.vision_tower…`). An unknown key keeps its name.
    """
    kept = [key for key in entries if not key.endswith(COMPUTED)]
    return collected(((canonical(key), entries[key]) for key in kept), path)


def collected(pairs: Iterable[tuple[str, Entry]], path: Path) -> dict[str, Entry]:
    """Tensors by pumice's names. Raises UserError when two have one name."""
    named: dict[str, Entry] = {}
    for name, entry in pairs:
        if name in named:
            raise UserError(
                f"{path}: {named[name].key} and {entry.key} are both {name}",
                hint="the files mix two checkpoints; get them again",
            )
        named[name] = entry
    return named


def unfused(pairs: Iterable[tuple[str, Entry]], text: TextConfig) -> Iterator[tuple[str, Entry]]:
    """Tensors by pumice's names, with Phi-3's joined matrices cut into views of their rows: queries, keys and values;
    gate and up. Lengths that do not fit show in the last piece."""
    inner, shared = text.heads * text.head_width, text.kv_heads * text.head_width
    cuts: dict[str, tuple[tuple[str, int, int | None], ...]] = {
        ".self_attn.qkv_proj.weight": (
            (".self_attn.q_proj.weight", 0, inner),
            (".self_attn.k_proj.weight", inner, inner + shared),
            (".self_attn.v_proj.weight", inner + shared, None),
        ),
        ".mlp.gate_up_proj.weight": (
            (".mlp.gate_proj.weight", 0, text.ffn_width),
            (".mlp.up_proj.weight", text.ffn_width, None),
        ),
    }
    for name, entry in pairs:
        joined = next((end for end in cuts if name.endswith(end)), None)
        if joined is None or len(entry.shape) != 2:
            yield name, entry
            continue
        for part, start, stop in cuts[joined]:
            yield name.removesuffix(joined) + part, entry.rows(start, stop)


def canonical(key: str) -> str:
    """pumice's name for a key of a LLaVA or a Llama in any of their layouts."""
    if key.startswith("lm_head."):
        return key
    name = key.removeprefix("model.")
    if name.startswith("mm_projector."):
        return _from_sequential(name.removeprefix("mm_projector."))
    if name.startswith("language_model."):
        inner = name.removeprefix("language_model.").removeprefix("model.")
        return inner if inner.startswith("lm_head.") else f"language_model.{inner}"
    if name.startswith("vision_tower."):
        inner = name.removeprefix("vision_tower.").removeprefix("vision_tower.")
        return f"vision_tower.{inner.removeprefix('vision_model.')}"
    if key.startswith("model.") and name.startswith(("embed_tokens.", "layers.", "norm.")):
        return f"language_model.{name}"
    return name if name.startswith(("multi_modal_projector.", "image_newline")) else key


def _from_sequential(rest: str) -> str:
    """`0.weight`, `2.weight`: the linear layers of a Sequential with GELUs between them; `weight`: one layer alone."""
    index, dot, field = rest.partition(".")
    if not dot:
        return f"multi_modal_projector.linear_1.{rest}"
    if index.isdecimal() and len(index) <= 2 and int(index) % 2 == 0:
        return f"multi_modal_projector.linear_{int(index) // 2 + 1}.{field}"
    return f"mm_projector.{rest}"


def checked(entries: Mapping[str, Entry], config: LlavaConfig, path: Path) -> Tensors:
    """Exactly the tensors of the config, or a UserError that names what is missing, extra, of another shape or type."""
    have = dict(entries)
    if config.text.tied_embeddings:
        have.pop("lm_head.weight", None)  # some writers store the tied matrix a second time
    return fitted(have, expected_tensors(config), path)


def fitted(have: Mapping[str, Entry], expected: Mapping[str, Shape], path: Path) -> Tensors:
    """Exactly the expected tensors. Raises UserError as `checked`."""
    if missing := expected.keys() - have.keys():
        raise _mismatch(path, f"lacks {listed(missing)}")
    if extra := have.keys() - expected.keys():
        keys = [have[name].key for name in extra]
        raise _mismatch(path, f"also holds {listed(keys)}, which its config has no place for")
    for name, shape in expected.items():
        if have[name].shape != shape:
            raise _mismatch(path, f"holds {name} of shape {list(have[name].shape)}, its config asks for {list(shape)}")
        if not have[name].dtype.is_floating_point:
            raise _mismatch(path, f"holds {name} as {have[name].dtype}, not as floating-point numbers")
    return Tensors({name: have[name] for name in expected})


def _mismatch(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} {what}",
        hint="weights and config.json belong to different models, or a file is incomplete; get them again",
    )
