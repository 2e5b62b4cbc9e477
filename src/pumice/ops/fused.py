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


@functools.cache
def _has_native_16bit(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies the type at full speed; oneDNN falls back to a plain loop where it does not."""
    if dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """`reference.linear`; many rows of a 16-bit type that the CPU lacks are multiplied in float32."""
    rows = x_TD.numel() // x_TD.shape[-1]
    narrow = x_TD.dtype in (torch.bfloat16, torch.float16) and x_TD.device.type == "cpu"
    if narrow and rows >= WIDEN_ROWS and not _has_native_16bit(x_TD.dtype):
        bias = None if bias_F is None else bias_F.float()
        return F.linear(x_TD.float(), weight_FD.float(), bias).to(x_TD.dtype)
    return F.linear(x_TD, weight_FD, bias_F)


def attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_BTS: Tensor | None, causal: bool) -> Tensor:
    """`reference.attention` by scaled_dot_product_attention, which never holds the whole score matrix."""
    mask = None if mask_BTS is None else mask_BTS[:, None]
    grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
    return F.scaled_dot_product_attention(q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
