"""The operations of the networks, and which code runs each: the only place where hardware matters.

`PUMICE_OPS=reference` runs the plain definitions everywhere, to tell a wrong kernel from a wrong network.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

from torch import Tensor

from pumice.errors import UserError, nearest
from pumice.ops import fused, reference
from pumice.ops.reference import gated_mlp, quick_gelu, rms_norm, rotary, rotate
from pumice.quant import QTensor

__all__ = ["attention", "embed", "gated_mlp", "linear", "quick_gelu", "rms_norm", "rotary", "rotate"]

BACKENDS = {"fused": fused, "reference": reference}


@functools.cache
def _backend() -> ModuleType:
    name = os.environ.get("PUMICE_OPS", "fused")
    if name not in BACKENDS:
        raise UserError(f"PUMICE_OPS is {name!r}, which is no set of operations", hint=nearest(name, BACKENDS))
    return BACKENDS[name]


def linear(x_TD: Tensor, weight_FD: Tensor | QTensor, bias_F: Tensor | None) -> Tensor:
    """x Wᵀ + b: see `reference.linear`."""
    if isinstance(weight_FD, QTensor):
        weight_FD = weight_FD.dense(x_TD.dtype)
    return _backend().linear(x_TD, weight_FD, bias_F)


def embed(ids_T: Tensor, weight_VD: Tensor | QTensor) -> Tensor:
    """The rows of a table: see `reference.embed`; of a table in blocks only those are unpacked."""
    return weight_VD.rows(ids_T) if isinstance(weight_VD, QTensor) else reference.embed(ids_T, weight_VD)


def attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_BTS: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Softmax attention with grouped key/value heads: see `reference.attention`."""
    return _backend().attention(q_BHTE, k_BKSE, v_BKSE, mask_BTS, causal)
