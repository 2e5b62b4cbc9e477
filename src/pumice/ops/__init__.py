"""The operations of the networks, and which code runs each: the only place where hardware matters.

Tensors that need no gradient go to the kernels of `cpu` or, on a CUDA device, to Triton's of `gpu` where there is one,
all others to PyTorch. `PUMICE_OPS=reference` runs the plain definitions everywhere, to tell a wrong kernel from a wrong
network.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from pumice import packing
from pumice.errors import UserError, nearest
from pumice.ops import cpu, fused, library, reference
from pumice.ops.cpu import Blocks, BlocksShape, BlockWeights
from pumice.ops.pages import LayerPages, Pages
from pumice.ops.reference import rotary
from pumice.quant import FORMATS, Format, QTensor

__all__ = [
    "BlockWeights",
    "Blocks",
    "BlocksShape",
    "Pages",
    "attention",
    "attention_in_pages",
    "captures",
    "embed",
    "fits_narrower",
    "gated_mlp",
    "linear",
    "linears",
    "narrower",
    "narrower_format",
    "quantised",
    "quick_gelu",
    "rms_norm",
    "rotary",
    "rotate",
    "takes_blocks",
]

BACKENDS = {"fused": fused, "reference": reference}
OLDEST_CUDA = (8, 0)
"""Compute capability for Triton's kernels: Ampere, the first that multiplies bfloat16."""


@functools.cache
def _backend() -> ModuleType:
    name = os.environ.get("PUMICE_OPS", "fused")
    if name not in BACKENDS:
        raise UserError(f"PUMICE_OPS is {name!r}, which is no set of operations", hint=nearest(name, BACKENDS))
    return BACKENDS[name]


def _by_kernels(x: Tensor) -> bool:
    """Whether the kernels of `cpu` take over: on a CPU, where no gradient is asked for."""
    return x.device.type == "cpu" and _backend() is fused and not (torch.is_grad_enabled() and x.requires_grad)


def _by_triton(x: Tensor) -> ModuleType | None:
    """The kernels of `gpu`, where they take over: on a CUDA device that has them, where no gradient is asked for."""
    return _triton(x.device) if x.is_cuda and _backend() is fused and not _learns(x) else None


@functools.cache
def _triton(device: torch.device) -> ModuleType | None:
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < OLDEST_CUDA:
        return None
    from pumice.ops import gpu  # its library takes time, and a CPU does without

    return gpu


def linear(x_TD: Tensor, weight_FD: Tensor | QTensor, bias_F: Tensor | None) -> Tensor:
    """x Wᵀ + b: see `reference.linear`. In bfloat16 where the matrix is, though x be in float32."""
    if isinstance(weight_FD, QTensor):
        if _by_kernels(x_TD) and weight_FD.format.dtype is None:
            return cpu.linears(x_TD, [weight_FD], [bias_F])[0]
        if weight_FD.format.dtype is None and (gpu := _by_triton(x_TD)):
            return gpu.linear(x_TD, weight_FD, bias_F)
        weight_FD = weight_FD.dense(x_TD.dtype)
    if weight_FD.dtype == torch.bfloat16 and _by_kernels(x_TD):  # of a model in float32 where `narrower` made it
        x_TD, bias_F = x_TD.to(torch.bfloat16), None if bias_F is None else bias_F.to(torch.bfloat16)
    return _backend().linear(x_TD, weight_FD, bias_F)


def linears(x_TD: Tensor, weights: Sequence[Tensor | QTensor], biases: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """`linear` of one input with several matrices."""
    in_blocks = [each for each in weights if isinstance(each, QTensor) and each.format.dtype is None]
    if len(in_blocks) == len(weights) and _by_kernels(x_TD):
        return cpu.linears(x_TD, in_blocks, biases)
    return [linear(x_TD, weight, bias) for weight, bias in zip(weights, biases)]


def embed(ids_T: Tensor, weight_VD: Tensor | QTensor) -> Tensor:
    """The rows of a table: see `reference.embed`; of a table in blocks only those are unpacked."""
    if not isinstance(weight_VD, QTensor):
        return reference.embed(ids_T, weight_VD)
    if weight_VD.format.dtype is None and (gpu := _by_triton(ids_T)):
        return gpu.embed(ids_T, weight_VD)
    return weight_VD.rows(ids_T)


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if x_D.dtype == weight_D.dtype == torch.float32 and _by_kernels(x_D) and not _learns(weight_D):
        return cpu.rms_norm(x_D, weight_D, eps)
    return reference.rms_norm(x_D, weight_D, eps)


def gated_mlp(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.gated_mlp`."""
    if gate.dtype == up.dtype == torch.float32 and _by_kernels(gate) and not _learns(up):
        return cpu.gated_mlp(gate, up)
    return reference.gated_mlp(gate, up)


def quick_gelu(x: Tensor) -> Tensor:
    """See `reference.quick_gelu`."""
    if x.dtype in (torch.float32, torch.bfloat16) and _by_kernels(x):
        return cpu.quick_gelu(x.float()).to(x.dtype)
    return reference.quick_gelu(x)


def rotate(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """See `reference.rotate`."""
    if x_BHTE.dtype == cos_BTE.dtype == torch.float32 and _by_kernels(x_BHTE):
        return cpu.rotate(x_BHTE, cos_BTE, sin_BTE)
    return reference.rotate(x_BHTE, cos_BTE, sin_BTE)


def attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_BTS: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Softmax attention with grouped key/value heads: see `reference.attention`. Keys and values may be of a narrower
    type than the queries."""
    plain = q_BHTE.dtype == torch.float32 and k_BKSE.dtype in cpu.KEY_TYPES and not _learns(k_BKSE)
    if plain and q_BHTE.shape[3] % 8 == 0 and _by_kernels(q_BHTE):
        return cpu.attention(q_BHTE, k_BKSE, v_BKSE, mask_BTS, causal)
    return _backend().attention(q_BHTE, k_BKSE.to(q_BHTE.dtype), v_BKSE.to(q_BHTE.dtype), mask_BTS, causal)


def attention_in_pages(
    q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, pages: LayerPages, positions_BT: Tensor, window: int | None
) -> Tensor:
    """New keys and values go to their pages; then see `reference.attention_in_pages`."""
    reference.put(k_BKTE, v_BKTE, pages, positions_BT)
    if _by_kernels(q_BHTE) and q_BHTE.shape[3] % 8 == 0 and pages.keys.dtype in cpu.KEY_TYPES:
        return cpu.attention_in_pages(q_BHTE.float(), pages, positions_BT, window).to(q_BHTE.dtype)
    if gpu := _by_triton(q_BHTE):
        return gpu.attention_in_pages(q_BHTE, pages, positions_BT, window)
    k_BKSE, v_BKSE, mask_BTS = reference.rows_of(pages, positions_BT, window)
    return _backend().attention(q_BHTE, k_BKSE.to(q_BHTE.dtype), v_BKSE.to(q_BHTE.dtype), mask_BTS, causal=False)


def quantised(weight_RC: Tensor, format: Format) -> QTensor:
    """The matrix in blocks: see `packing.quantised`, which itself runs where the kernels were not built."""
    if format.dtype is None and _by_kernels(weight_RC) and library.built():
        return cpu.quantised(weight_RC, format)
    return packing.quantised(weight_RC, format)


def fits_narrower(weight: Tensor) -> bool:
    """Whether it is a matrix that `narrower` takes: on a CPU, in whole blocks."""
    return weight.dim() == 2 and weight.is_cpu and weight.shape[1] % FORMATS["Q8_0"].block_weights == 0


def narrower_format() -> Format:
    """The form of fewer bits in which this CPU multiplies a matrix with many rows fastest: bfloat16 where PyTorch has
    tiles for it, otherwise blocks of eight bits."""
    tiles = _backend() is fused and library.built() is not None and library.bf16_tiles()
    return FORMATS["BF16" if tiles else "Q8_0"]


def narrower(weight_FD: Tensor) -> Tensor | QTensor:
    """The matrix in `narrower_format`."""
    format = narrower_format()
    return weight_FD.to(format.dtype) if format.dtype else quantised(weight_FD, format)


def captures(x: Tensor) -> bool:
    """Whether a pass with such inputs over pages may be captured in a CUDA graph: none of its operations waits."""
    return _by_triton(x) is not None


def takes_blocks(x_BTD: Tensor) -> bool:
    """Whether `Blocks` is the faster form of the language model's blocks for this input."""
    return x_BTD.dtype == torch.float32 and _by_kernels(x_BTD)


def _learns(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad
