"""A tensor's values in the type that a file is to hold them in, a stretch of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pumice import ops
from pumice.errors import UserError
from pumice.quant import FORMATS, Format, QTensor

STRETCH = 2**22
"""Numbers that are in memory at once beside the source and the result; quantising without the kernels holds some twenty
copies of them."""

FORMAT_OF = {each.dtype: each for each in FORMATS.values() if each.dtype is not None}


def recoded(name: str, values: Tensor | QTensor, format: Format) -> np.ndarray[Any, Any]:
    """The bytes of a tensor in a format. Blocks of the same format stay as they are.

    Raises UserError for numbers that the format cannot hold.
    """
    if isinstance(values, QTensor):
        values = values.in_order()
    if isinstance(values, QTensor) and values.format == format:
        return values.data_RB.contiguous().numpy()
    if format.dtype is not None and not isinstance(values, QTensor) and values.dtype == format.dtype:
        return _bytes(values)
    whole, at = np.empty(math.prod(values.shape[:-1]) * format.row_bytes(values.shape[-1]), dtype=np.uint8), 0
    for stretch in _stretches(values):
        part = _recoded(name, stretch, format)
        whole[at : at + part.size] = part
        at += part.size
    return whole


def _recoded(name: str, x_RC: Tensor, format: Format) -> np.ndarray[Any, Any]:
    cast = x_RC.to(format.dtype or torch.float32)
    if not _finite(cast):
        what = "infinite or no number" if not _finite(x_RC) else f"beyond what {format.name} can hold"
        raise UserError(f"{name} has a value that is {what}", hint="choose a type with wider numbers: BF16 or F32")
    return ops.quantised(cast, format).data_RB.flatten().numpy() if format.dtype is None else _bytes(cast)


def _finite(x: Tensor) -> bool:
    # What is no number is both ends. x.isfinite().all() takes twice as long as packing to Q8_0.
    return x.numel() == 0 or all(math.isfinite(end) for end in x.aminmax())


def _stretches(values: Tensor | QTensor) -> Iterator[Tensor]:
    """As plain numbers; a vector is one."""
    if len(values.shape) == 1:
        assert isinstance(values, Tensor)
        yield values
        return
    step = max(1, STRETCH // (values.shape[-1] if isinstance(values, QTensor) else values[0].numel()))
    for at in range(0, values.shape[0], step):
        if isinstance(values, QTensor):
            yield QTensor(values.data_RB[at : at + step], values.format).dense()
        else:
            yield values[at : at + step]


def _bytes(values: Tensor) -> np.ndarray[Any, Any]:
    return values.contiguous().flatten().view(torch.uint8).numpy()
