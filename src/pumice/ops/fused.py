"""PyTorch's own fused forms of the operations that have one; any device. Twins of `reference`.

B rows · T query positions · S key positions · D, F widths · H heads · K key/value heads · E width of a head
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# From this many rows on, widening a 16-bit weight to float32 costs less than the slow product it avoids.
WIDEN_ROWS = 32
ROWS_A_TILE = 16
"""oneDNN compiles a product of 16-bit types anew for each number of rows (.5 to 4 MB and ten times the time of a small
product), and then computes whole tiles of so many: whole tiles are what it is asked for."""


@functools.cache
def _has_native_16bit(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies the type at full speed; oneDNN falls back to a plain loop where it does not."""
    if dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """`reference.linear`; rows of a 16-bit type come in whole tiles where the CPU has products of it, and many of them
    are multiplied in float32 where it has none."""
    if x_TD.dtype not in (torch.bfloat16, torch.float16) or x_TD.device.type != "cpu":
        return F.linear(x_TD, weight_FD, bias_F)
    rows = x_TD.numel() // x_TD.shape[-1]
    if _has_native_16bit(x_TD.dtype):
        if rows > 1 and (missing := -rows % ROWS_A_TILE):
            tiles_TD = F.pad(x_TD.reshape(rows, -1), (0, 0, 0, missing))
            return F.linear(tiles_TD, weight_FD, bias_F)[:rows].view(*x_TD.shape[:-1], -1)
    elif rows >= WIDEN_ROWS:
        bias = None if bias_F is None else bias_F.float()
        return F.linear(x_TD.float(), weight_FD.float(), bias).to(x_TD.dtype)
    return F.linear(x_TD, weight_FD, bias_F)


def attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_BTS: Tensor | None, causal: bool) -> Tensor:
    """`reference.attention` by scaled_dot_product_attention, which never holds the whole score matrix."""
    mask = None if mask_BTS is None else mask_BTS[:, None]
    grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
    return F.scaled_dot_product_attention(q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
