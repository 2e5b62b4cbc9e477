"""What the machine can do at most: `limits.cpp`, compiled for this processor and run."""

from __future__ import annotations

import ctypes
import json
import mmap
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

READ_BYTES = 1_500_000_000
"""More than any cache holds."""
MEANING = {
    "read": "memory is read, GB/s",
    "mapped": "the same in small pages, as a mapped file has them where its file system has no larger, GB/s",
    "fp32": "float32 multiply-adds, Gop/s",
    "int8": "byte products summed in 32 bits, Gop/s",
    "narrow": "four-bit by byte products summed in 16 bits, Gop/s",
    "wide": "products of 16-bit words summed in 32 bits, Gop/s",
    "tiles": "products of bfloat16 in tiles, Gop/s",
}


@dataclass(frozen=True)
class Limits:
    """Bytes or operations a second; 0 where the processor has no such instruction that the program knows."""

    read: float
    mapped: float
    fp32: float
    int8: float
    narrow: float
    wide: float
    tiles: float


def build(folder: Path) -> Path | None:
    """The program, compiled; None where no compiler is installed."""
    return _compiled(folder / "limits", [])


def reader(folder: Path, threads: int) -> Callable[[Tensor], None] | None:
    """The loop behind `read`, for bytes of the caller's; None where no compiler is installed."""
    compiled = _compiled(folder / "limits.so", ["-shared", "-fPIC"])
    if compiled is None:
        return None
    loop = ctypes.CDLL(str(compiled)).sum_of
    loop.restype, loop.argtypes = ctypes.c_uint64, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]

    def read(bytes_N: Tensor) -> None:
        loop(bytes_N.data_ptr(), bytes_N.numel() // 8, threads)

    return read


def in_large_pages(size: int) -> Tensor:
    """So many bytes of memory, as `read` finds them: in large pages where they can be had."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, size, **private)  # shared memory has small ones
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).fill_(1)


def _compiled(to: Path, more: Sequence[str]) -> Path | None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    to.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-march=native", "-fopenmp", "-std=c++17", *more]
    subprocess.run([compiler, *flags, str(Path(__file__).with_name("limits.cpp")), "-o", str(to)], check=True)
    return to


def measure(program: Path, threads: int, read_bytes: int = READ_BYTES) -> Limits:
    command = [str(program), str(threads), str(read_bytes)]
    return Limits(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
