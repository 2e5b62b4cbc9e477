"""A language model in GGUF, and the projector file (mmproj) with the eyes beside it.

What the files mean is taken from the checkpoints that they are made of, not from what llama.cpp computes of them, where
the two differ: docs/formats.md. Facts: convert_hf_to_gguf.py, convert_legacy_llama.py, gguf-py's constants.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pumice.chat_template import template_for
from pumice.checkpoints import gguf_vocab
from pumice.checkpoints.fields import Fields, decimal, shown
from pumice.checkpoints.form import Checkpoint, checked, collected, unfused
from pumice.checkpoints.gguf_eyes import PROJECTOR, PROJECTOR_PREFIX, Eyes, read_eyes
from pumice.checkpoints.gguf_file import GgufFile, Stored, architecture, open_gguf
from pumice.checkpoints.origin import Origin, as_folder, inner, origin_of
from pumice.checkpoints.settings import MAX_LAYERS, SCALINGS, divisors, unsupported
from pumice.checkpoints.sidefiles import TOKENIZER_FILES, known_template, usual_template
from pumice.checkpoints.tensors import Entry
from pumice.config import LlavaConfig, Rotary, TextConfig
from pumice.errors import UserError
from pumice.quant import QTensor, heads_turned
from pumice.tokenizer import Tokenizer

ARCHITECTURES = ("llama", "phi3")
IMAGE_TOKEN = -200
"""The authors' id of an image, outside every vocabulary."""

MODEL_KEY = "pumice.model"
"""Of a file that pumice wrote: what no key of llama.cpp's says, as a JSON object."""

NAMES = {
    "token_embd": "language_model.embed_tokens",
    "output_norm": "language_model.norm",
    "output": "lm_head",
}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IN_PHI_3_BLOCK = IN_BLOCK | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
LLAMA_3 = "rope_freqs.weight"
LONG_ROPE = ("rope_factors_short.weight", "rope_factors_long.weight")
"""Divisors of rotary frequencies: part of the config here, tensors in the file."""


def read(path: Path, projector: Path | None, template: str | None, *, worded: bool) -> Checkpoint:
    """The checkpoint in a language model's file, with the projector named or found beside it; without one a text model.

    Raises UserError; see `checkpoints.read`.
    """
    file = open_gguf(path)
    fields = file.fields
    if fields.text("general.architecture") == PROJECTOR:
        raise UserError(
            f"{path} is a projector, the eyes of a model",
            hint="give the language model's file, and this one beside it with --with",
        )
    text = _text_config(file)
    entries = list(unfused(_entries(file, text), text))
    origin = origin_of(file.values, str(path), [name for name, _ in entries])
    tokenizer = _tokenizer(fields, origin)
    own = inner(fields, MODEL_KEY)
    stops = own.wholes("stop_ids", least=0, most=text.vocab - 1) or gguf_vocab.stop_ids(fields, tokenizer)
    kind = "mistral" if text.kv_heads < text.heads and text.rotary.theta == 1e6 else "llama"
    jinja = fields.text("tokenizer.chat_template") if "tokenizer.chat_template" in fields else None
    named = template or (own.text("template") if "template" in own else None)
    unread = worded and named is None and jinja is not None and template_for(jinja) is None
    chosen = known_template(named, None if unread else jinja, path) or usual_template(kind, stops, tokenizer)
    config = LlavaConfig(text, None, None, None, chosen, stops)
    if eyes := _eyes(path, projector, text):
        tiled = eyes.image.mode == "anyres"
        token = own.whole("image_token_id", IMAGE_TOKEN, least=IMAGE_TOKEN, most=text.vocab - 1)
        config = replace(config, vision=eyes.vision, projector=eyes.projector, image=eyes.image, image_token_id=token)
        config = replace(config, has_newline=tiled, family="llava-1.6" if tiled else "llava-1.5")
        entries += eyes.entries.items()
        if origin is not None:
            origin = replace(origin, dtypes={**origin.dtypes, **eyes.dtypes})
    tensors = checked(collected(entries, path), config, path)
    beside = eyes.path if eyes else None
    return Checkpoint(path, "gguf", config, tokenizer, tensors, projector=beside, origin=origin)


def _tokenizer(fields: Fields, origin: Origin | None) -> Tokenizer:
    """From the files of the folder where they came along: they say more than llama.cpp's keys can."""
    files = {name: data for name, data in origin.files.items() if name in TOKENIZER_FILES} if origin else {}
    if "tokenizer.json" not in files and "tokenizer.model" not in files:
        return gguf_vocab.tokenizer(fields)
    with as_folder(files) as folder:
        return Tokenizer.from_folder(folder)


def _eyes(path: Path, projector: Path | None, text: TextConfig) -> Eyes | None:
    """From the file that was named; or the one beside the language model that bears its name; or the only one there
    whose features fit it."""
    if projector is not None:
        eyes = read_eyes(projector)
        if eyes.width_out != text.width:
            raise UserError(
                f"{projector} makes features of width {eyes.width_out}, {path} has width {text.width}",
                hint="the two belong to different models; take the projector that came with this one",
            )
        return eyes
    own = path.with_name(f"{PROJECTOR_PREFIX}{path.name}")
    if own != path and architecture(own) == PROJECTOR:
        return _eyes(path, own, text)
    near = [each for each in sorted(path.parent.glob("*.gguf")) if each != path and architecture(each) == PROJECTOR]
    fitting = [eyes for eyes in map(read_eyes, near) if eyes.width_out == text.width]
    if len(fitting) > 1:
        names = " and ".join(str(each.path) for each in fitting[:3])
        raise UserError(f"{names} are both projectors that fit {path}", hint="name one with --with")
    return fitting[0] if fitting else None


def _text_config(file: GgufFile) -> TextConfig:
    fields = file.fields
    kind = fields.one_of("general.architecture", None, ARCHITECTURES)
    width = fields.whole(f"{kind}.embedding_length")
    heads = fields.whole(f"{kind}.attention.head_count", most=1024)
    kv_heads = fields.whole(f"{kind}.attention.head_count_kv", heads, most=1024)
    head_width = fields.whole(f"{kind}.attention.key_length", width // heads or None)
    if heads % kv_heads or head_width % 2:
        raise fields.wrong(f"{kind}.attention.head_count_kv", f"a divisor of the {heads} heads, each of an even width")
    _refuse_others(file, kind, head_width)
    positions = fields.whole(f"{kind}.context_length", most=2**24)
    return TextConfig(
        vocab=_rows(file, "token_embd.weight"),
        width=width,
        layers=fields.whole(f"{kind}.block_count", most=MAX_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        ffn_width=fields.whole(f"{kind}.feed_forward_length"),
        rotary=_rotary(file, kind, head_width, positions),
        norm_eps=decimal(fields.number(f"{kind}.attention.layer_norm_rms_epsilon")),
        max_positions=positions,
        window=_window(fields, kind),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        tied_embeddings="output.weight" not in file.tensors,
    )


def _refuse_others(file: GgufFile, kind: str, head_width: int) -> None:
    """What would compute anything else than pumice's Llama does."""
    fields = file.fields
    if fields.whole(f"{kind}.expert_count", 0, least=0):
        raise unsupported(fields, "the model is a mixture of experts", "dense models")
    if fields.whole(f"{kind}.rope.dimension_count", head_width) != head_width:
        raise fields.wrong(f"{kind}.rope.dimension_count", f"the width of a head, {head_width}")
    if fields.whole(f"{kind}.attention.value_length", head_width) != head_width:
        raise fields.wrong(f"{kind}.attention.value_length", f"the width of a head, {head_width}")


def _window(fields: Fields, kind: str) -> int | None:
    """Of Phi-3 a key of llama.cpp's; of a Llama that pumice wrote one of its own."""
    own = inner(fields, MODEL_KEY).whole("window", 0, least=0, most=2**24)
    return fields.whole(f"{kind}.attention.sliding_window", own, least=0, most=2**24) or None


def _rotary(file: GgufFile, kind: str, head_width: int, positions: int) -> Rotary:
    """Divisors of the frequencies are tensors (Llama 3.1 has one set, Phi-3 two), a linear scaling is metadata."""
    fields, half = file.fields, head_width // 2
    scaling = fields.text(f"{kind}.rope.scaling.type", "linear")
    if scaling not in ("none", "linear", "longrope"):
        raise unsupported(fields, f"rotary scaling is of type {shown(scaling)}", SCALINGS)
    factor = fields.number(f"{kind}.rope.scaling.factor", fields.number(f"{kind}.rope.scale_linear", 1.0))
    factor = 1.0 if scaling == "none" else decimal(factor)
    theta = decimal(fields.number(f"{kind}.rope.freq_base", 1e4))
    magnitude = decimal(fields.number(f"{kind}.rope.scaling.attn_factor", 1.0))
    sets = {name: _divisors(file, name, half) for name in (*LONG_ROPE, LLAMA_3) if name in file.tensors}
    match tuple(sets):
        case () if scaling != "longrope":
            return Rotary(theta, (factor,) * half if factor != 1 else (), magnitude=magnitude)
        case (name,) if name == LLAMA_3 and scaling != "longrope" and factor == 1:
            return Rotary(theta, sets[name], magnitude=magnitude)
        case names if names == LONG_ROPE and factor == 1:
            switch = fields.whole(f"{kind}.rope.scaling.original_context_length", positions, most=2**24)
            return Rotary(theta, sets[names[0]], sets[names[1]], switch, magnitude)
    raise unsupported(fields, f"rotary scaling {shown(scaling)} by {factor} comes with {list(sets)}", SCALINGS)


def _divisors(file: GgufFile, name: str, count: int) -> tuple[float, ...]:
    stored = file.tensors[name]
    values = stored.entry().dense().tolist() if stored.shape == (count,) else f"of shape {list(stored.shape)}"
    return divisors(Fields({name: values}, str(file.path)), name, count)


def _rows(file: GgufFile, name: str) -> int:
    if name not in file.tensors or len(file.tensors[name].shape) != 2:
        raise UserError(f"{file.path} has no matrix {name}", hint="the file is damaged, or no language model")
    return file.tensors[name].shape[0]


def _entries(file: GgufFile, text: TextConfig) -> Iterator[tuple[str, Entry]]:
    """The tensors by pumice's names; queries and keys with their rows in Transformers' order, which Phi-3's have."""
    phi_3 = file.fields.raw("general.architecture") == "phi3"
    for stored in file.tensors.values():
        if stored.name in (LLAMA_3, *LONG_ROPE):
            continue
        name = name_of(stored.name, _IN_PHI_3_BLOCK if phi_3 else IN_BLOCK)
        match = re.search(r"\.self_attn\.([qk])_proj\.", name)
        if match is None or phi_3:
            yield name, stored.entry()
        else:
            yield name, _turned(stored, text.head_width)


def name_of(key: str, in_block: Mapping[str, str] = IN_BLOCK) -> str:
    """pumice's name for a tensor of a language model's file; an unknown key keeps its own."""
    stem, _, part = key.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{part}"
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,3})\.(\w+)", stem)
    if match is None or match[2] not in in_block:
        return key
    return f"language_model.layers.{match[1]}.{in_block[match[2]]}.{part}"


def _turned(stored: Stored, head_width: int) -> Entry:
    """The rows of each head in Transformers' order; of a matrix in blocks they stay where they are, and it says so."""

    def load() -> Tensor | QTensor:
        values = stored.load()
        if isinstance(values, QTensor):
            return replace(values, head_width=head_width)
        return values[heads_turned(len(values), head_width)]

    return replace(stored.entry(load), computed=stored.format.dtype is not None)
