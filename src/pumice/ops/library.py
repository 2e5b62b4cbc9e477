"""The C interface of ops/native (abi.h), described to ctypes, and the library behind it.

The library is loaded after torch, so that both run on the threads of one OpenMP. `PUMICE_CPU` names an instruction set
(portable, avx2, avx512, amx) to use instead of the best one that this CPU has.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch  # loaded first, for its OpenMP

from pumice.errors import UserError, nearest

LIBRARY = "libpumice_cpu.so"
INSTRUCTION_SETS = {"portable": 0, "avx2": 1, "avx512": 2, "amx": 3}


class CMatrix(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("row_bytes", c_int64),
        ("rows", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("bias", c_void_p),
        ("format", c_int32),
        ("head_width", c_int32),
    )


class CPages(ctypes.Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("table", c_void_p),
        ("row_pages", c_int64),
        ("page_stride", c_int64),
        ("page", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("type", c_int32),
    )


class CAttention(ctypes.Structure):
    _fields_ = (
        ("q", c_void_p),
        ("q_row_stride", c_int64),
        ("q_head_stride", c_int64),
        ("q_token_stride", c_int64),
        ("pages", CPages),
        ("places", c_void_p),
        ("mask", c_void_p),
        ("out", c_void_p),
        ("rows", c_int64),
        ("tokens", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_width", c_int64),
        ("positions", c_int64),
        ("window", c_int64),
    )


class CBlock(ctypes.Structure):
    _fields_ = (
        *((name, CMatrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("input_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


class CPass(ctypes.Structure):
    _fields_ = (
        ("x", c_void_p),
        ("cosine", c_void_p),
        ("sine", c_void_p),
        ("places", c_void_p),
        ("pages", CPages),
        ("rows", c_int64),
        ("tokens", c_int64),
        ("kept", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_width", c_int64),
        ("width", c_int64),
        ("ffn_width", c_int64),
        ("window", c_int64),
        ("eps", c_float),
    )


_SIGNATURES: dict[str, tuple[type | None, Sequence[type]]] = {
    "pumice_best_isa": (c_int32, ()),
    "pumice_scratch_bytes": (c_int64, (c_int32, c_int64, c_int64, c_int32)),
    "pumice_matmul": (
        None,
        (c_int32, POINTER(CMatrix), c_int32, c_void_p, c_int64, c_int64, c_int64, c_int32, c_void_p),
    ),
    "pumice_rms_norm": (
        None,
        (c_int32, c_void_p, c_int64, c_void_p, c_float, c_int64, c_int64, c_void_p, c_int32),
    ),
    "pumice_gated": (None, (c_int32, c_void_p, c_void_p, c_float, c_int64, c_void_p, c_int32)),
    "pumice_rotate": (
        None,
        (c_int32, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32),
    ),
    "pumice_pack": (None, (c_int32, c_int32, c_void_p, c_int64, c_void_p, c_int32)),
    "pumice_attention_floats": (c_int64, (c_int32, POINTER(CAttention), c_int32)),
    "pumice_attention": (None, (c_int32, POINTER(CAttention), c_int32, c_void_p)),
    "pumice_blocks_bytes": (c_int64, (c_int32, POINTER(CPass), c_int32)),
    "pumice_blocks": (None, (c_int32, POINTER(CBlock), c_int32, POINTER(CPass), c_int32, c_void_p)),
}


@functools.cache
def built() -> Path | None:
    """Where the library lies; None when it was not built."""
    places = (Path(folder) / LIBRARY for folder in sys.modules[__package__].__path__)
    return next((path for path in places if path.exists()), None)


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels. Raises UserError when they were not built."""
    path = built()
    if path is None:
        raise UserError(
            f"pumice's CPU kernels ({LIBRARY}) are not beside its code",
            hint="install pumice with pip, which builds them; PUMICE_OPS=reference runs slowly without them",
        )
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, list(arguments)
    return loaded


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
        raise UserError(
            f"PUMICE_CPU is {name!r}, which this CPU, its system or this build does not have", hint="leave it out"
        )
    return INSTRUCTION_SETS[name]


@functools.cache
def bf16_tiles() -> bool:
    """Whether PyTorch multiplies bfloat16 in tiles here (AMX), several times faster than the kernels multiply bytes.
    Raises UserError as `instruction_set` does."""
    return instruction_set() == INSTRUCTION_SETS["amx"] and torch.ops.mkldnn._is_mkldnn_bf16_supported()
