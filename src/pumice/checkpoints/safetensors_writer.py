"""A safetensors file written tensor after tensor: the library's own writer wants all of them in memory.

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
