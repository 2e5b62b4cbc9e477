"""What the kernels of `cpu` are promised, held before a pointer is passed: they check nothing themselves, and with what
does not fit would read or write foreign memory.

Each raises AssertionError. No file can: its tensors are held to its config where it is read (`checkpoints.form`).

B rows · T query positions · S key positions · D, F widths · H heads · K key/value heads · E width of a head · P pages
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pumice.quant import QTensor


def plain(*tensors: Tensor) -> None:
    """Float32 on the CPU."""
    for each in tensors:
        found = f"{each.dtype} on {each.device}"
        assert found == "torch.float32 on cpu", f"the kernels compute with torch.float32 on cpu, not {found}"


def product(channels: int, weight: QTensor, bias_F: Tensor | None) -> None:
    rows, columns = weight.shape
    assert columns == channels, f"{channels} channels meet a matrix of {columns} columns"
    assert weight.device.type == "cpu", f"the matrix is on {weight.device}"
    assert bias_F is None or bias_F.shape == (rows,), f"a bias of shape {list(bias_F.shape)} beside {rows} rows"


def alike(what: str, *tensors: Tensor) -> None:
    """One shape, type and layout."""
    first = tensors[0]
    shape, stride, dtype, device = first.shape, first.stride(), first.dtype, first.device
    for each in tensors:
        assert each.shape == shape, f"{what} differ: {list(each.shape)}, {list(shape)}"
        assert each.stride() == stride, f"{what} differ in their layout: {each.stride()}, {stride}"
        assert each.dtype == dtype, f"{what} differ: {each.dtype}, {dtype}"
        assert each.device == device, f"{what} differ: {each.device}, {device}"


def norm(x_D: Tensor, weight_D: Tensor) -> None:
    plain(x_D, weight_D)
    assert weight_D.shape == x_D.shape[-1:], f"{weight_D.numel()} weights for a width of {x_D.shape[-1]}"


def rotation(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> None:
    plain(x_BHTE, cos_BTE, sin_BTE)
    assert x_BHTE.shape[-1] % 2 == 0, f"channels turn in pairs, and {x_BHTE.shape[-1]} are odd"


def heads(count: int, kv_heads: int, head_width: int) -> None:
    assert count % kv_heads == 0, f"{count} heads share {kv_heads} of keys"
    assert head_width % 8 == 0, f"heads are {head_width} wide, not a multiple of 8"


def attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_BTS: Tensor | None, causal: bool) -> None:
    plain(q_BHTE)
    rows, count, tokens, width = q_BHTE.shape
    assert (k_BKSE.shape[0], k_BKSE.shape[3]) == (rows, width), f"keys {list(k_BKSE.shape)} for {list(q_BHTE.shape)}"
    heads(count, k_BKSE.shape[1], width)
    positions = k_BKSE.shape[2]
    assert not causal or tokens <= positions, f"the last of {tokens} queries sees {tokens} of {positions} keys"
    assert mask_BTS is None or mask_BTS.dtype == torch.bool, "a mask is of torch.bool"


def block(matrices: Sequence[QTensor], expected: Sequence[tuple[int, int]], norms: Sequence[Tensor]) -> None:
    found = [each.shape for each in matrices]
    assert found == list(expected), f"the matrices of a block are {found}, not {list(expected)}"
    width = expected[0][1]
    assert [each.shape for each in norms] == [(width,)] * 2, f"norms are not of width {width}"
    plain(*norms)


def passed(x_BTD: Tensor, turn: tuple[Tensor, Tensor], width: int, head_width: int) -> None:
    plain(x_BTD, *turn)
    found, expected = (x_BTD.shape[-1], *(each.shape[-1] for each in turn)), (width, head_width, head_width)
    assert found == expected, f"hidden states, cosines and sines are {found} wide, not {expected}"


def pages(keys_and_values: Sequence[Tensor], heads_and_width: tuple[int, int]) -> None:
    """Of all layers, each (pages, K, page, E)."""
    alike("keys and values", *keys_and_values)
    _, heads, _, width = keys_and_values[0].shape
    assert (heads, width) == heads_and_width, f"keys of {heads} heads of {width}, not {heads_and_width}"


def places(table_BP: Tensor, places_BT: Tensor, keys_NKSE: Tensor) -> None:
    """Positions lie in the pages of their rows, and these exist."""
    assert len(table_BP) == len(places_BT), f"{len(table_BP)} rows of pages for {len(places_BT)} rows of positions"
    _within("pages", table_BP, keys_NKSE.shape[0])
    _within("positions", places_BT, table_BP.shape[1] * keys_NKSE.shape[2])


def _within(what: str, numbers: Tensor, end: int) -> None:
    assert numbers.dtype == torch.int64, f"{what} are of {numbers.dtype}"
    assert numbers.numel(), f"there are no {what}"
    listed = numbers.flatten().tolist()  # few: that is quicker than to ask PyTorch
    assert 0 <= min(listed) <= max(listed) < end, f"{what} {min(listed)} to {max(listed)} of {end}"
