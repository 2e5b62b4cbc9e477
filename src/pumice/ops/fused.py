"""PyTorch's own fused forms of the operations that have one; any device. Twins of `reference`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_BTS: Tensor | None, causal: bool) -> Tensor:
    """`reference.attention` by scaled_dot_product_attention, which never holds the whole score matrix."""
    mask = None if mask_BTS is None else mask_BTS[:, None]
    grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
    return F.scaled_dot_product_attention(q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
