"""Which format each matrix of a language model gets under a name such as Q4_K_M: llama-quantize's choices, without an
importance matrix.

Source: llama.cpp's llama-quant.cpp (llama_tensor_get_type), for the architecture `llama`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pumice.config import TextConfig
from pumice.errors import UserError, nearest
from pumice.quant import FORMATS, Format


@dataclass(frozen=True)
class Mix:
    """`file_type` is llama.cpp's number for the whole file, general.file_type."""

    name: str
    file_type: int
    base: Format


MIXES = {
    name: Mix(name, file_type, FORMATS[base])
    for name, file_type, base in (
        ("F32", 0, "F32"),
        ("F16", 1, "F16"),
        ("BF16", 32, "BF16"),
        ("Q4_0", 2, "Q4_0"),
        ("Q4_1", 3, "Q4_1"),
        ("Q5_0", 8, "Q5_0"),
        ("Q5_1", 9, "Q5_1"),
        ("Q8_0", 7, "Q8_0"),
        ("Q2_K", 10, "Q2_K"),
        ("Q3_K_S", 11, "Q3_K"),
        ("Q3_K_M", 12, "Q3_K"),
        ("Q3_K_L", 13, "Q3_K"),
        ("Q4_K_S", 14, "Q4_K"),
        ("Q4_K_M", 15, "Q4_K"),
        ("Q5_K_S", 16, "Q5_K"),
        ("Q5_K_M", 17, "Q5_K"),
        ("Q6_K", 18, "Q6_K"),
    )
}
_SHORT = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

_NARROWER = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What takes a format's place in rows that are not whole blocks of 256."""


def mix(name: str) -> Mix:
    """By its name, in either case. Raises UserError for an unknown one."""
    upper = name.upper()
    if _SHORT.get(upper, upper) not in MIXES:
        raise UserError(f"there is no quantisation named {name!r}", hint=nearest(upper, MIXES))
    return MIXES[_SHORT.get(upper, upper)]


def format_of(key: str, columns: int, chosen: Mix, text: TextConfig) -> Format:
    """The format of a matrix of a language model. `key` is its name in the file, `columns` the length of its rows."""
    if chosen.base.dtype is not None:
        return chosen.base
    return fitting(_wanted(key, columns, chosen, text), columns)


def fitting(wanted: Format, columns: int) -> Format:
    """The format itself, or what takes its place where a row is not made of whole blocks."""
    for format in (wanted, FORMATS[_NARROWER.get(wanted.name, wanted.name)]):
        if columns % format.block_weights == 0:
            return format
    return FORMATS["F16"]


def _wanted(key: str, columns: int, chosen: Mix, text: TextConfig) -> Format:
    if key == ("token_embd.weight" if text.tied_embeddings else "output.weight"):
        whole = columns % chosen.base.block_weights == 0
        return FORMATS["Q6_K" if whole and chosen.base.name != "Q8_0" else "Q8_0"]
    match = re.fullmatch(r"blk\.(\d+)\.(attn_v|attn_output|ffn_down)\.weight", key)
    if match is None:
        return chosen.base
    layer, name = int(match[1]), chosen.name
    match match[2]:
        case "attn_v":
            better = _values(layer, name, text)
            if text.layers == 80 and text.kv_heads < text.heads and (better or chosen.base.name) in ("Q3_K", "Q4_K"):
                better = "Q5_K"  # a 70B: eight heads share one matrix, so bits are cheap here
        case "attn_output":
            better = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(name)
        case _:
            better = _down(layer, name, text.layers)
    return FORMATS[better] if better else chosen.base


def _values(layer: int, name: str, text: TextConfig) -> str | None:
    match name:
        case "Q2_K":
            return "Q4_K" if text.heads // text.kv_heads >= 4 else "Q3_K"
        case "Q3_K_M":
            return "Q5_K" if layer < 2 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if _more_bits(layer, text.layers):
            return "Q6_K"
        case "Q4_K_S" if layer < 4:
            return "Q5_K"
    return None


def _down(layer: int, name: str, layers: int) -> str | None:
    match name:
        case "Q2_K":
            return "Q3_K"
        case "Q3_K_M":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if _more_bits(layer, layers):
            return "Q6_K"
        case "Q4_K_S" if layer < layers // 8:
            return "Q5_K"
    return None


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
