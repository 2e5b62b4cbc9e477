"""Every operation of the networks in plain PyTorch: the definition. A faster form must agree with it.

B rows · T query positions · S key positions · D, F widths · H heads · K key/value heads · E width of a head
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pumice.config import Rotary
from pumice.ops.pages import LayerPages


def linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """x Wᵀ + b over the last axis."""
    product_TF = x_TD @ weight_FD.T
    return product_TF if bias_F is None else product_TF + bias_F


def embed(ids_T: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of the table: (*ids.shape, D)."""
    return weight_VD[ids_T]


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019), as Transformers' LlamaRMSNorm rounds it: in
    float32, back to the input's type, then times the weight."""
    x32_D = x_D.float()
    scaled_D = x32_D * torch.rsqrt(x32_D.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * scaled_D.to(x_D.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x): the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def rotary(
    positions_BT: Tensor, head_width: int, rotary: Rotary, reach_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (Su et al. 2021), float32, shape (B, T, head_width).

    Half-split order, as in Transformers: the angle of channel i equals that of channel i + head_width/2. A row whose
    last position, `reach_B` or the last of these, is `rotary.switch` or beyond turns by the long divisors.
    """
    like = positions_BT.device
    frequency = _frequency(rotary.theta, rotary.divisors, head_width, like)
    if rotary.switch is not None:
        last_B = positions_BT.amax(1) if reach_B is None else reach_B
        beyond_B11 = last_B[:, None, None] >= rotary.switch
        long = _frequency(rotary.theta, rotary.long_divisors, head_width, like)
        frequency = torch.where(beyond_B11, long, frequency)
    angle = positions_BT[..., None].float() * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos() * rotary.magnitude, angle.sin() * rotary.magnitude


@functools.cache
def _frequency(theta: float, divisors: tuple[float, ...], head_width: int, device: torch.device) -> Tensor:
    """Radians a position, (head_width / 2). Made once: a copy from the host cannot be part of a CUDA graph."""
    exponent = torch.arange(0, head_width, 2, dtype=torch.int64, device=device).float() / head_width
    base = theta**exponent
    return 1.0 / (torch.tensor(divisors, device=device) * base if divisors else base)


def rotate(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """Turn queries or keys by their positions: the pair (i, i + E/2) rotates together."""
    first, second = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_BTE[:, None] + torch.cat((-second, first), dim=-1) * sin_BTE[:, None]


def attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_BTS: Tensor | None, causal: bool) -> Tensor:
    """Softmax attention, scaled by 1/sqrt(E), softmax in float32. Result: (B, H, T, E).

    `mask_BTS` is True where a query may look; `causal` is the lower triangle for T == S and excludes a mask.
    Query head h reads key/value head h // (H / K) (grouped-query attention, Ainslie et al. 2023).
    """
    group = q_BHTE.shape[1] // k_BKSE.shape[1]
    k_BHSE, v_BHSE = k_BKSE.repeat_interleave(group, dim=1), v_BKSE.repeat_interleave(group, dim=1)
    scores_BHTS = q_BHTE @ k_BHSE.transpose(-1, -2) * q_BHTE.shape[-1] ** -0.5
    if causal:
        tokens, keys = scores_BHTS.shape[-2:]
        allowed_TS = torch.ones(tokens, keys, dtype=torch.bool, device=q_BHTE.device).tril()
        scores_BHTS = scores_BHTS.masked_fill(~allowed_TS, float("-inf"))
    elif mask_BTS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask_BTS[:, None], float("-inf"))
    return scores_BHTS.softmax(-1, dtype=torch.float32).to(v_BKSE.dtype) @ v_BHSE


def put(k_BKTE: Tensor, v_BKTE: Tensor, pages: LayerPages, positions_BT: Tensor) -> None:
    """Keys and values to their places in the pages."""
    size = pages.keys.shape[2]
    page_BT = pages.table_RP.gather(1, positions_BT // size)
    for kept_NKSE, new_BKTE in ((pages.keys, k_BKTE), (pages.values, v_BKTE)):
        kept_NKSE[page_BT, :, positions_BT % size] = new_BKTE.transpose(1, 2).to(kept_NKSE.dtype)


def rows_of(pages: LayerPages, positions_BT: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values as rows, (B, K, S, E) each, and the mask of `attention`: a query sees its row up to its own
    position, `window` positions at most."""
    reach = int(positions_BT.max()) + 1
    places_S = torch.arange(reach, device=positions_BT.device)
    mask_BTS = places_S <= positions_BT[..., None]
    # What no query of the row sees may be anything, and nothing times that may be no number.
    unseen_B1S1 = ~mask_BTS.any(1)[:, None, :, None]
    keys, values = (
        _row(each_NKSE, pages.table_RP, reach).masked_fill(unseen_B1S1, 0) for each_NKSE in (pages.keys, pages.values)
    )
    if window is not None:
        mask_BTS = mask_BTS & (places_S > positions_BT[..., None] - window)
    return keys, values, mask_BTS


def attention_in_pages(q_BHTE: Tensor, pages: LayerPages, positions_BT: Tensor, window: int | None) -> Tensor:
    """`attention` of each query over its row up to its own position: (B, H, T, E)."""
    k_BKSE, v_BKSE, mask_BTS = rows_of(pages, positions_BT, window)
    return attention(q_BHTE, k_BKSE.to(q_BHTE.dtype), v_BKSE.to(q_BHTE.dtype), mask_BTS, causal=False)


def _row(kept_NKSE: Tensor, table_RP: Tensor, reach: int) -> Tensor:
    _, heads, _, width = kept_NKSE.shape
    return kept_NKSE[table_RP].transpose(1, 2).reshape(len(table_RP), heads, -1, width)[:, :, :reach]


def gated_mlp(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's middle: silu(gate) · up (Shazeer 2020)."""
    return torch.nn.functional.silu(gate) * up
