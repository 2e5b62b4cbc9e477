"""safetensors files written tensor after tensor: the library's own writer wants all of them in memory.

Format: an 8-byte length, that many bytes of JSON, the values in the order of their offsets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPE_NAMES = {each: str(each)[6:] for each in _NAMES}
"""As a config.json has them."""


@dataclass(frozen=True)
class Weight:
    """A tensor to be written; `load` gives its values, which are cast to `dtype`, when their turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def put_safetensors(path: Path, weights: Mapping[str, Weight]) -> Iterator[str]:
    """Writes the file, and yields each key when its bytes are written. The widest numbers come first, as the library
    has it, so that each begins at a multiple of its size."""
    order = sorted(weights, key=lambda key: (-weights[key].dtype.itemsize, key))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in order:
        start, end = end, end + weights[key].nbytes
        each = weights[key]
        header[key] = {"dtype": _NAMES[each.dtype], "shape": list(each.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            # The CPU because a file takes its bytes from there.
            values = weights[key].load().detach().to("cpu", weights[key].dtype).contiguous()
            assert tuple(values.shape) == weights[key].shape, key
            file.write(values.flatten().view(torch.uint8).numpy().data)
            yield key


def put_shards(folder: Path, weights: Mapping[str, Weight], max_bytes: int) -> Iterator[str]:
    """Writes `model.safetensors`, or shards of at most so many bytes (or one tensor) and their index, and yields each
    key when its bytes are written."""
    shards = list(_shards(weights, max_bytes))
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        yield from put_safetensors(folder / file, {key: weights[key] for key in keys})
        weight_map |= dict.fromkeys(keys, file)
    if len(shards) > 1:
        total = sum(each.nbytes for each in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(weights: Mapping[str, Weight], max_bytes: int) -> Iterator[list[str]]:
    keys: list[str] = []
    filled = 0
    for key, each in weights.items():
        if keys and filled + each.nbytes > max_bytes:
            yield keys
            keys, filled = [], 0
        keys.append(key)
        filled += each.nbytes
    yield keys


def main_dtype(weights: Mapping[str, Weight]) -> torch.dtype:
    """The type of the largest part."""
    sizes: dict[torch.dtype, int] = {}
    for each in weights.values():
        sizes[each.dtype] = sizes.get(each.dtype, 0) + each.nbytes
    return max(sizes, key=lambda each: sizes[each])
