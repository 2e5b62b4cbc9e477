"""Block-quantised weights: what each format's bytes say.

Every format cuts a row into blocks of 32 or 256 weights that share scales.

N blocks · B bytes of a block · W weights of a block · G groups with a scale of their own in it · E weights of a group
R rows
Source: ggml's `dequantize_row_*` (ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Format:
    """A way of storing weights. `id` is ggml's number of the type in a GGUF file."""

    name: str
    id: int
    block_weights: int
    block_bytes: int
    dtype: torch.dtype | None = None
    """PyTorch's type of the same bytes, for the formats without blocks."""

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many weights; `columns` must be whole blocks."""
        assert columns % self.block_weights == 0, f"{columns} columns in blocks of {self.block_weights}"
        return columns // self.block_weights * self.block_bytes


FORMATS = {
    each.name: each
    for each in (
        Format("F32", 0, 1, 4, torch.float32),
        Format("F16", 1, 1, 2, torch.float16),
        Format("BF16", 30, 1, 2, torch.bfloat16),
        Format("Q4_0", 2, 32, 18),
        Format("Q4_1", 3, 32, 20),
        Format("Q5_0", 6, 32, 22),
        Format("Q5_1", 7, 32, 24),
        Format("Q8_0", 8, 32, 34),
        Format("Q2_K", 10, 256, 84),
        Format("Q3_K", 11, 256, 110),
        Format("Q4_K", 12, 256, 144),
        Format("Q5_K", 13, 256, 176),
        Format("Q6_K", 14, 256, 210),
        Format("IQ4_NL", 20, 32, 18),
    )
}
BY_ID = {each.id: each for each in FORMATS.values()}


@dataclass(frozen=True)
class QTensor:
    """A matrix in blocks: `data_RB` holds the bytes of each row, (rows, bytes of a row), uint8. `dtype` is the type
    that is computed with, and that it unpacks to. Beside a `head_width` the rows of each head stand in llama.cpp's
    order (see `heads_turned`), and everything that is made of the matrix in Transformers'."""

    data_RB: Tensor
    format: Format
    dtype: torch.dtype = torch.float32
    head_width: int = 0

    def __post_init__(self) -> None:
        kind, size = (self.data_RB.dtype, self.data_RB.dim()), self.format.block_bytes
        assert kind == (torch.uint8, 2), f"{kind[1]} dimensions of {kind[0]} are no rows of bytes"
        assert self.data_RB.shape[1] % size == 0, f"rows of {self.data_RB.shape[1]} bytes in blocks of {size}"
        whole = not self.head_width or len(self.data_RB) % self.head_width == self.head_width % 2 == 0
        assert whole, f"{len(self.data_RB)} rows are no heads of {self.head_width}"

    @property
    def shape(self) -> tuple[int, int]:
        rows, row_bytes = self.data_RB.shape
        return rows, row_bytes // self.format.block_bytes * self.format.block_weights

    @property
    def device(self) -> torch.device:
        return self.data_RB.device

    @property
    def nbytes(self) -> int:
        return self.data_RB.nbytes

    def to(self, device: torch.device, dtype: torch.dtype) -> QTensor:
        """The same blocks on another device, to be computed with in another type."""
        return replace(self, data_RB=self.data_RB.to(device), dtype=dtype)

    def in_order(self) -> QTensor:
        """The matrix with its rows where Transformers has them: itself, or a copy."""
        if not self.head_width:
            return self
        return replace(self, data_RB=self.data_RB[heads_turned(self.shape[0], self.head_width)], head_width=0)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights as plain numbers, (rows, columns)."""
        blocks_NB = self.in_order().data_RB.reshape(-1, self.format.block_bytes)
        return unpack(blocks_NB, self.format).to(dtype or self.dtype).view(self.shape)

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows as plain numbers: (*ids.shape, columns)."""
        some = replace(self, data_RB=self.in_order().data_RB[ids.flatten()], head_width=0)
        return some.dense().view(*ids.shape, self.shape[1])


def heads_turned(rows: int, head_width: int) -> Tensor:
    """Which row of llama.cpp's order stands at each place of Transformers': its rotary embedding turns neighbours
    (2i, 2i + 1), theirs the two halves (i, i + width / 2)."""
    return torch.arange(rows).view(-1, head_width // 2, 2).transpose(1, 2).flatten()


def unpack(blocks_NB: Tensor, format: Format) -> Tensor:
    """The weights of blocks, (N, W) in float32, from their bytes, (N, B) uint8."""
    if format.dtype is not None:
        return blocks_NB.contiguous().view(format.dtype).float()
    return _UNPACK[format.name](blocks_NB)


# --- bytes to numbers -------------------------------------------------------------------------------------------------


def _f16(blocks_NB: Tensor, at: int) -> Tensor:
    """The half-precision number at a byte, (N, 1) float32."""
    # A copy, not a view: it begins at an even byte wherever the block does.
    return blocks_NB[:, at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _nibbles(bytes_NX: Tensor) -> Tensor:
    """(N, 2, X): all low halves, then all high halves."""
    return torch.stack((bytes_NX & 15, bytes_NX >> 4), dim=1)


def _bits(bytes_NX: Tensor, count: int, width: int = 1) -> Tensor:
    """(N, count, X): the fields of `width` bits in each byte, lowest first."""
    shifts = torch.arange(0, count * width, width, dtype=torch.uint8, device=bytes_NX.device)
    return (bytes_NX[:, None] >> shifts[:, None]) & ((1 << width) - 1)


def _fifth_bit(bytes_N4: Tensor) -> Tensor:
    """(N, 32): bit e of a little-endian word belongs to element e."""
    return _bits(bytes_N4, 8).transpose(1, 2).flatten(1)


def _unpack_q4_0(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 2:]).flatten(1).float() - 8) * _f16(b, 0)


def _unpack_q4_1(b: Tensor) -> Tensor:
    return _nibbles(b[:, 4:]).flatten(1).float() * _f16(b, 0) + _f16(b, 2)


def _unpack_q5_0(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 6:]).flatten(1) | _fifth_bit(b[:, 2:6]) << 4
    return (q.float() - 16) * _f16(b, 0)


def _unpack_q5_1(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 8:]).flatten(1) | _fifth_bit(b[:, 4:8]) << 4
    return q.float() * _f16(b, 0) + _f16(b, 2)


def _unpack_q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _f16(b, 0)


def _unpack_iq4_nl(b: Tensor) -> Tensor:
    levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32, device=b.device)
    return levels[_nibbles(b[:, 2:]).flatten(1).long()] * _f16(b, 0)


def _quarters(b_N64: Tensor) -> Tensor:
    """(N, 256): two bits each; byte l of a half of 32 holds its elements l, 32 + l, 64 + l and 96 + l."""
    return torch.cat([_bits(half, 4, 2).flatten(1) for half in b_N64.chunk(2, dim=1)], dim=1)


def _grouped(q_N256: Tensor, scale_NG: Tensor, min_NG: Tensor | None = None) -> Tensor:
    """scale * q - min, by group."""
    groups = scale_NG.shape[1]
    y_NGE = scale_NG[..., None] * q_N256.float().view(-1, groups, 256 // groups)
    return (y_NGE if min_NG is None else y_NGE - min_NG[..., None]).flatten(1)


def _unpack_q2_k(b: Tensor) -> Tensor:
    d, dmin, scales = _f16(b, 80), _f16(b, 82), b[:, :16]
    return _grouped(_quarters(b[:, 16:80]), d * (scales & 15), dmin * (scales >> 4))


def _unpack_q3_k(b: Tensor) -> Tensor:
    low, high = _nibbles(b[:, 96:104]).flatten(1), _bits(b[:, 104:108], 4, 2).flatten(1)
    scale = (low | high << 4).float() - 32
    q = (_quarters(b[:, 32:96]) | _bits(b[:, :32], 8).flatten(1) << 2).float() - 4
    return _grouped(q, _f16(b, 108) * scale)


def _six_bit_pairs(s_N12: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and eight mins of Q4_K and Q5_K, six bits each in twelve bytes."""
    first, second, third = s_N12.chunk(3, dim=1)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1)
    mins = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)
    return scales, mins


def _unpack_q4_k(b: Tensor) -> Tensor:
    scales, mins = _six_bit_pairs(b[:, 4:16])
    q = torch.cat([_nibbles(group).flatten(1) for group in b[:, 16:].chunk(4, dim=1)], dim=1)
    return _grouped(q, _f16(b, 0) * scales, _f16(b, 2) * mins)


def _unpack_q5_k(b: Tensor) -> Tensor:
    scales, mins = _six_bit_pairs(b[:, 4:16])
    q = torch.cat([_nibbles(group).flatten(1) for group in b[:, 48:].chunk(4, dim=1)], dim=1)
    q |= _bits(b[:, 16:48], 8).flatten(1) << 4
    return _grouped(q, _f16(b, 0) * scales, _f16(b, 2) * mins)


def _unpack_q6_k(b: Tensor) -> Tensor:
    low = torch.cat([_nibbles(half).flatten(1) for half in b[:, :128].chunk(2, dim=1)], dim=1)
    q = (low | _quarters(b[:, 128:192]) << 4).float() - 32
    scales = b[:, 192:208].contiguous().view(torch.int8).float()
    return _grouped(q, _f16(b, 208) * scales)


_UNPACK: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _unpack_q4_0,
    "Q4_1": _unpack_q4_1,
    "Q5_0": _unpack_q5_0,
    "Q5_1": _unpack_q5_1,
    "Q8_0": _unpack_q8_0,
    "Q2_K": _unpack_q2_k,
    "Q3_K": _unpack_q3_k,
    "Q4_K": _unpack_q4_k,
    "Q5_K": _unpack_q5_k,
    "Q6_K": _unpack_q6_k,
    "IQ4_NL": _unpack_iq4_nl,
}
