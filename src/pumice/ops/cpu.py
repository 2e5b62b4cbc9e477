"""The C++ kernels of ops/native, loaded by ctypes: products with weights in blocks, and small operations in one pass.

B rows · T query positions · S key positions · D, F widths · H heads · K key/value heads · E width of a head

The library is loaded after torch, so that both run on the threads of one OpenMP. `PUMICE_CPU` names an instruction set
(portable, avx2, avx512) to use instead of the best one that this CPU has.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from pumice.errors import UserError, nearest
from pumice.quant import QTensor

LIBRARY = "libpumice_cpu.so"
INSTRUCTION_SETS = {"portable": 0, "avx2": 1, "avx512": 2}
KEY_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FEW_QUERIES = 8
"""More queries than this go to PyTorch's attention, which multiplies matrices."""


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("row_bytes", c_int64),
        ("rows", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("bias", c_void_p),
        ("format", c_int32),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        ("q", c_void_p),
        ("q_row_stride", c_int64),
        ("q_head_stride", c_int64),
        ("q_token_stride", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("page", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("mask", c_void_p),
        ("out", c_void_p),
        ("rows", c_int64),
        ("tokens", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("width", c_int64),
        ("positions", c_int64),
        ("type", c_int32),
    )


_SIGNATURES: dict[str, tuple[type | None, Sequence[type]]] = {
    "pumice_best_isa": (c_int32, ()),
    "pumice_scratch_bytes": (c_int64, (c_int32, c_int64, c_int64, c_int32)),
    "pumice_matmul": (
        None,
        (c_int32, POINTER(_Matrix), c_int32, c_void_p, c_int64, c_int64, c_int64, c_int32, c_void_p),
    ),
    "pumice_rms_norm": (
        None,
        (c_int32, c_void_p, c_int64, c_void_p, c_float, c_int64, c_int64, c_void_p, c_int32),
    ),
    "pumice_gated_mlp": (None, (c_int32, c_void_p, c_void_p, c_int64, c_void_p, c_int32)),
    "pumice_rotate": (
        None,
        (c_int32, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32),
    ),
    "pumice_attention": (None, (c_int32, POINTER(_Attention), c_int32, c_void_p)),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels. Raises UserError when they were not built."""
    for folder in sys.modules[__package__].__path__:
        path = Path(folder) / LIBRARY
        if path.exists():
            loaded = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(loaded, name)
                function.restype, function.argtypes = result, list(arguments)
            return loaded
    raise UserError(
        f"pumice's CPU kernels ({LIBRARY}) are not beside its code",
        hint="install pumice with pip, which builds them; PUMICE_OPS=reference runs slowly without them",
    )


@functools.cache
def instruction_set() -> int:
    """The number of the instruction set in use. Raises UserError for a PUMICE_CPU that this CPU lacks."""
    best = int(library().pumice_best_isa())
    name = os.environ.get("PUMICE_CPU")
    if name is None:
        return best
    if name not in INSTRUCTION_SETS:
        raise UserError(f"PUMICE_CPU is {name!r}, which is no instruction set", hint=nearest(name, INSTRUCTION_SETS))
    if INSTRUCTION_SETS[name] > best:
        raise UserError(f"PUMICE_CPU is {name!r}, which this CPU does not have", hint="leave it out")
    return INSTRUCTION_SETS[name]


def linears(x_TD: Tensor, weights: Sequence[QTensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """x Wᵀ + b for each matrix in blocks; the activations are rounded once, to eight bits (docs/kernels.md).

    x_TD: any leading shape; its type is the result's.
    """
    rows_MD = x_TD.reshape(-1, x_TD.shape[-1]).to(torch.float32).contiguous()
    m, k = rows_MD.shape
    outs = [torch.empty(m, weight.shape[0]) for weight in weights]
    if m:
        held = [None if bias is None else bias.to(torch.float32).contiguous() for bias in biases]
        blocks = [weight.data_RB.contiguous() for weight in weights]
        matrices = (_Matrix * len(weights))(
            *(
                _Matrix(
                    block_RB.data_ptr(),
                    block_RB.shape[1],
                    block_RB.shape[0],
                    out_MF.data_ptr(),
                    out_MF.shape[1],
                    None if bias_F is None else bias_F.data_ptr(),
                    weight.format.id,
                )
                for weight, block_RB, bias_F, out_MF in zip(weights, blocks, held, outs)
            )
        )
        isa, threads = instruction_set(), torch.get_num_threads()
        scratch = torch.empty(library().pumice_scratch_bytes(isa, m, k, threads), dtype=torch.uint8)
        library().pumice_matmul(isa, matrices, len(weights), rows_MD.data_ptr(), k, m, k, threads, scratch.data_ptr())
    return [out_MF.to(x_TD.dtype).view(*x_TD.shape[:-1], -1) for out_MF in outs]


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm` of float32."""
    rows_MD = x_D.reshape(-1, x_D.shape[-1]).contiguous()
    out_MD, weight_D = torch.empty_like(rows_MD), weight_D.contiguous()
    m, width = rows_MD.shape
    library().pumice_rms_norm(
        instruction_set(),
        rows_MD.data_ptr(),
        width,
        weight_D.data_ptr(),
        eps,
        m,
        width,
        out_MD.data_ptr(),
        torch.get_num_threads(),
    )
    return out_MD.view(x_D.shape)


def gated_mlp(gate: Tensor, up: Tensor) -> Tensor:
    """`reference.gated_mlp` of float32."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    library().pumice_gated_mlp(
        instruction_set(), gate.data_ptr(), up.data_ptr(), gate.numel(), out.data_ptr(), torch.get_num_threads()
    )
    return out


def rotate(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """`reference.rotate` of float32."""
    x_BTHE = x_BHTE.transpose(1, 2).contiguous()
    rows, tokens, heads, width = x_BTHE.shape
    cos_BTE, sin_BTE = (each.expand(rows, tokens, width).contiguous() for each in (cos_BTE, sin_BTE))
    out_BTHE = torch.empty_like(x_BTHE)
    library().pumice_rotate(
        instruction_set(),
        x_BTHE.data_ptr(),
        cos_BTE.data_ptr(),
        sin_BTE.data_ptr(),
        rows * tokens,
        heads,
        width,
        out_BTHE.data_ptr(),
        torch.get_num_threads(),
    )
    return out_BTHE.transpose(1, 2)


def attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_BTS: Tensor | None) -> Tensor:
    """`reference.attention` of a few float32 queries over keys and values of any type in KEY_TYPES; not causal.

    Each row of the cache is one page of as many positions as it has room for.
    """
    rows, heads, tokens, width = q_BHTE.shape
    positions = k_BKSE.shape[2]
    if k_BKSE.stride() != v_BKSE.stride() or k_BKSE.stride(3) != 1:
        k_BKSE, v_BKSE = k_BKSE.contiguous(), v_BKSE.contiguous()
    if q_BHTE.stride(3) != 1:
        q_BHTE = q_BHTE.contiguous()
    mask = None if mask_BTS is None else mask_BTS.expand(rows, tokens, positions).contiguous()
    pages = [
        (c_void_p * rows)(*(each.data_ptr() + row * each.stride(0) * each.itemsize for row in range(rows)))
        for each in (k_BKSE, v_BKSE)
    ]
    out_BTHE = torch.empty(rows, tokens, heads, width)
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * positions)
    described = _Attention(
        q_BHTE.data_ptr(),
        q_BHTE.stride(0),
        q_BHTE.stride(1),
        q_BHTE.stride(2),
        ctypes.addressof(pages[0]),
        ctypes.addressof(pages[1]),
        positions,
        k_BKSE.stride(1),
        k_BKSE.stride(2),
        None if mask is None else mask.data_ptr(),
        out_BTHE.data_ptr(),
        rows,
        tokens,
        heads,
        k_BKSE.shape[1],
        width,
        positions,
        KEY_TYPES[k_BKSE.dtype],
    )
    library().pumice_attention(instruction_set(), ctypes.byref(described), threads, scratch.data_ptr())
    return out_BTHE.transpose(1, 2)
