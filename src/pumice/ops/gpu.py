"""Operations on a CUDA device by Triton's kernels: twins of `reference`. Nothing here waits for the device.

B rows · T query positions · D, F widths · M inputs of a product · H heads · K key/value heads · E width of a head
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.ops import kernels
from pumice.ops.pages import LayerPages
from pumice.quant import Format, QTensor

MOST_INPUTS = 64
"""More inputs than that are multiplied by cuBLAS with the whole matrix unpacked, one matrix at a time."""
MOST_WIDE_INPUTS = 16
"""The same in float32, in which a larger tile does not stay in registers; queries of a program too."""
SHORTEST_PART = 256
"""Keys; fewer are not worth a part of their own."""
LONGEST_PARTS = 64

_UNITS = {
    "Q4_0": (1, 2, 16), "Q4_1": (1, 2, 16), "Q5_0": (1, 2, 16), "Q5_1": (1, 2, 16), "IQ4_NL": (1, 2, 16),
    "Q8_0": (1, 1, 32), "Q4_K": (4, 2, 32), "Q5_K": (4, 2, 32),
    "Q2_K": (2, 4, 32), "Q3_K": (2, 4, 32), "Q6_K": (2, 4, 32),
}  # fmt: skip
"""Units of a block, planes of a unit, lanes of a plane: see `kernels._plane`."""


# --- attention --------------------------------------------------------------------------------------------------------


def attention_in_pages(
    q_BHTE: Tensor, pages: LayerPages, positions_BT: Tensor, window: int | None, parts: int | None = None
) -> Tensor:
    """`reference.attention_in_pages`, nothing of the pages copied, softmax in float32.

    parts: in so many parts the keys of a query are read at the same time; None chooses by the size of the device.
    """
    rows, heads, tokens, width = q_BHTE.shape
    _, kv_heads, size, _ = pages.keys.shape
    assert pages.keys.stride() == pages.values.stride(), "keys and values lie differently"
    assert pages.keys.stride(3) == pages.table_RP.stride(1) == 1, "keys or pages of a row are apart"
    q_BHTE = q_BHTE if q_BHTE.stride(3) == 1 else q_BHTE.contiguous()
    places_BT = positions_BT.expand(rows, tokens)
    group = heads // kv_heads
    wide = q_BHTE.dtype == torch.float32
    m = min(MOST_WIDE_INPUTS if wide else 64, max(16, _power_of_two(group * tokens)))
    programs = -(-group * tokens // m), rows * kv_heads
    if parts is None:
        parts = _parts(q_BHTE.device, programs[0] * programs[1], pages.table_RP.shape[1] * size)
    lanes = max(16, _power_of_two(width))
    n = 32 if wide or lanes > 128 else 64
    out_BTHE = torch.empty(rows, tokens, heads, width, dtype=q_BHTE.dtype, device=q_BHTE.device)
    reach = torch.empty(parts, rows, tokens, heads, dtype=torch.float32, device=q_BHTE.device)
    mixed = out_BTHE if parts == 1 else torch.empty(*reach.shape, width, dtype=torch.float32, device=q_BHTE.device)
    with _on(q_BHTE):
        kernels.attend[(*programs, parts)](
            q_BHTE, pages.keys, pages.values, pages.table_RP, places_BT, mixed, reach,
            *q_BHTE.stride()[:3], *pages.keys.stride()[:3], pages.table_RP.stride(0), *places_BT.stride(),
            heads, tokens, parts, width**-0.5,
            GROUP=group, PAGE=size, WIDTH=width, WINDOW=window or 0, M=m, N=n, E=lanes, num_warps=4, num_stages=2,
        )  # fmt: skip
        if parts > 1:
            queries, most = reach[0].numel(), _power_of_two(parts)
            kernels.join[(queries,)](mixed, reach, out_BTHE, queries, parts, WIDTH=width, E=lanes, P=most, num_warps=1)
    return out_BTHE.transpose(1, 2)


def _parts(device: torch.device, programs: int, positions: int) -> int:
    """So that each multiprocessor has about two programs, however few rows there are."""
    wanted = -(-2 * _multiprocessors(device) // programs)
    return max(1, min(wanted, positions // SHORTEST_PART, LONGEST_PARTS))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches where PyTorch's current device is."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


# --- blocks -----------------------------------------------------------------------------------------------------------


def linear(x_TD: Tensor, weight: QTensor, bias_F: Tensor | None) -> Tensor:
    """x Wᵀ + b, W in blocks and in Transformers' order whatever its own. One input meets the weights in float32, few
    meet tiles of them that are unpacked on the way, many the whole matrix in the inputs' type."""
    rows, columns = weight.shape
    assert x_TD.shape[-1] == columns, f"inputs of {x_TD.shape[-1]} numbers for {columns} columns"
    x_MD = x_TD.reshape(-1, columns).contiguous()
    inputs = len(x_MD)
    if inputs > (MOST_WIDE_INPUTS if x_TD.dtype == torch.float32 else MOST_INPUTS):
        return F.linear(x_TD, dense(weight, x_TD.dtype), bias_F)
    out_MF = torch.empty(inputs, rows, dtype=x_TD.dtype, device=x_TD.device)
    shared = (x_MD, weight.data_RB, bias_F, out_MF)
    sizes = (rows, _units(weight), weight.data_RB.stride(0))
    with _on(x_TD):
        if inputs == 1:
            tile = {"N": 8, "U": 8 if _lanes(weight.format) == 16 else 4, "num_warps": 4}
            kernels.row_product[(-(-rows // 8),)](*shared, *sizes, **_constants(weight), **tile)
        elif inputs:
            m, units = max(16, _power_of_two(inputs)), 4 if _lanes(weight.format) == 16 else 2
            tile = {"M": m, "N": 32, "U": units}
            kernels.product[-(-rows // 32), 1](
                *shared, inputs, *sizes, **_constants(weight), **tile, num_warps=4, num_stages=2
            )
    return out_MF.view(*x_TD.shape[:-1], rows)


def dense(weight: QTensor, dtype: torch.dtype) -> Tensor:
    """`QTensor.dense`."""
    return _unpacked(weight, torch.arange(weight.shape[0], device=weight.device), dtype)


def embed(ids_T: Tensor, weight: QTensor) -> Tensor:
    """`QTensor.rows`."""
    return _unpacked(weight, ids_T.flatten(), weight.dtype).view(*ids_T.shape, weight.shape[1])


def _unpacked(weight: QTensor, ids_X: Tensor, dtype: torch.dtype) -> Tensor:
    out_XD = torch.empty(len(ids_X), weight.shape[1], dtype=dtype, device=weight.device)
    units, at_once = _units(weight), 512 // _lanes(weight.format)
    if len(ids_X):
        with _on(out_XD):
            kernels.unpack[len(ids_X), -(-units // at_once)](
                weight.data_RB, ids_X, out_XD, units, weight.data_RB.stride(0), **_constants(weight), U=at_once
            )
    return out_XD


def _units(weight: QTensor) -> int:
    """Units of a row."""
    assert weight.data_RB.stride(1) == 1, "bytes of a row are apart"
    blocks = weight.data_RB.shape[1] // weight.format.block_bytes
    return blocks * _UNITS[weight.format.name][0]


def _lanes(format: Format) -> int:
    return _UNITS[format.name][2]


def _constants(weight: QTensor) -> dict[str, object]:
    of_block, planes, lanes = _UNITS[weight.format.name]
    return {
        "FORMAT": weight.format.name,
        "BYTES": weight.format.block_bytes,
        "UNITS_OF_BLOCK": of_block,
        "PLANES": planes,
        "L": lanes,
        "HEAD": weight.head_width,
    }
