"""Numbers into blocks: ggml's reference quantiser, repeated to the bit.

Float32 throughout, sums in the order of the elements, no fused multiply-add, no importance matrix. `quant` has the
formats and the way back; `ops.quantised` writes the same bytes in C++.

N blocks · B bytes of a block · W weights of a block · G groups with a scale of their own in it · E weights of a group
R rows · C columns
Source: ggml's `quantize_row_*_ref` (ggml-quants.c), as restated by the tests' vectors.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pumice.quant import Format, QTensor

SMALLEST = 1e-15
"""A group whose largest weight lies below is all zero to the fits of Q3_K and Q6_K."""


def quantised(weight_RC: Tensor, format: Format) -> QTensor:
    """A matrix of plain numbers in blocks. `weight_RC`: (rows, columns), columns in whole blocks."""
    rows, columns = weight_RC.shape
    blocks_NW = weight_RC.float().reshape(-1, format.block_weights)
    return QTensor(pack(blocks_NW, format).view(rows, format.row_bytes(columns)), format)


def pack(x_NW: Tensor, format: Format) -> Tensor:
    """The bytes of blocks, (N, B) uint8, from weights, (N, W) float32, as ggml's reference quantiser writes them."""
    if format.dtype is not None:
        return x_NW.to(format.dtype).view(torch.uint8)
    return _PACK[format.name](x_NW)


def _sum(x: Tensor) -> Tensor:
    """Along the last axis, one element after the other: torch's own sum adds in another order."""
    return functools.reduce(operator.add, x.unbind(-1))


def _extreme(x: Tensor) -> Tensor:
    """The number of largest magnitude along the last axis with its sign, the first of equals; that axis stays, as 1.
    Among zeros it is the positive one."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True)) + 0.0


def _over(number: float, x: Tensor) -> Tensor:
    """number / x, rounded once. `number / x` is to torch x.reciprocal() * number, which rounds twice."""
    return torch.tensor(number) / x


def _ratio(a: Tensor | float, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b != 0, torch.as_tensor(a) / b, 0.0)


def _half_bytes(x_N1: Tensor) -> Tensor:
    return x_N1.to(torch.float16).view(torch.uint8)


def _level(x: Tensor, least: int, most: int) -> Tensor:
    """Rounded half to even, within bounds; still float32. Beyond 2²² the low bits of the sum decide, as in ggml's
    nearest_int: where a group is far larger than its super-block's scale can say."""
    bits = (x + 12582912.0).view(torch.int32) & 0x7FFFFF
    return (bits - 0x400000).clamp(least, most).float()


def _u8(x: Tensor, most: int = 255) -> Tensor:
    """Whole numbers as bytes, at most `most`; truncates as C does."""
    return x.to(torch.int32).to(torch.uint8).clamp(max=most)


def _paired(q_NX: Tensor, half: int) -> Tensor:
    """Two four-bit values in a byte: element e of each run of 2 * half lies low, e + half high."""
    runs = q_NX.view(q_NX.shape[0], -1, 2, half)
    return (runs[:, :, 0] & 15 | runs[:, :, 1] << 4).flatten(1)


def _gathered_bits(bits: Tensor, width: int = 1) -> Tensor:
    """(..., count, X) fields of `width` bits into (..., X) bytes, the first field lowest."""
    return functools.reduce(operator.or_, (each << index * width for index, each in enumerate(bits.unbind(-2))))


def _pack_q4_0(x: Tensor) -> Tensor:
    d = _extreme(x) / -8
    q = _u8(x * _ratio(1.0, d) + 8.5, 15)
    return torch.cat((_half_bytes(d), _paired(q, 16)), dim=1)


def _pack_q5_0(x: Tensor) -> Tensor:
    d = _extreme(x) / -16
    q = _u8(x * _ratio(1.0, d) + 16.5, 31)
    return torch.cat((_half_bytes(d), _fifth_bytes(q), _paired(q, 16)), dim=1)


def _fifth_bytes(q_N32: Tensor) -> Tensor:
    return _gathered_bits((q_N32 >> 4).view(-1, 4, 8).transpose(1, 2))


def _pack_with_min(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    # The first of equals, for a zero's sign.
    low, high = (x.gather(1, at) for at in (x.argmin(1, keepdim=True), x.argmax(1, keepdim=True)))
    d = (high - low) / top
    q = _u8((x - low) * _ratio(1.0, d) + 0.5, top)
    return torch.cat((_half_bytes(d), _half_bytes(low)), dim=1), q


def _pack_q4_1(x: Tensor) -> Tensor:
    head, q = _pack_with_min(x, 15)
    return torch.cat((head, _paired(q, 16)), dim=1)


def _pack_q5_1(x: Tensor) -> Tensor:
    head, q = _pack_with_min(x, 31)
    return torch.cat((head, _fifth_bytes(q), _paired(q, 16)), dim=1)


def _pack_q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _ratio(1.0, d)
    whole = scaled.trunc()
    away = whole + torch.where((scaled - whole).abs() >= 0.5, scaled.sign(), 0.0)
    return torch.cat((_half_bytes(d), away.to(torch.int8).view(torch.uint8)), dim=1)


@dataclass(frozen=True)
class _MinFit:
    """The numbers of one fit of scale and min (ggml's make_qkx2_quants): levels 0..top, `steps` + 1 divisors from
    top + first on, `step` apart, judged by weighted squares or by weighted distances."""

    top: int
    first: float
    step: float
    steps: int
    squared: bool

    def of(self, x_NGE: Tensor, w_NGE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and min, (N, G, 1) each, the min as what is subtracted; levels, (N, G, E)."""
        low = x_NGE.amin(-1, keepdim=True).clamp(max=0)
        high = x_NGE.amax(-1, keepdim=True)
        flat = high == low
        sum_w, sum_x = (_sum(each)[..., None] for each in (w_NGE, w_NGE * x_NGE))
        divisor = _over(self.top, high - low)
        scale, levels = 1 / divisor, _level(divisor * (x_NGE - low), 0, self.top)
        best = self._error(x_NGE, w_NGE, levels, scale, low)
        for step in range(self.steps + 1):
            reach = torch.tensor(self.first) + torch.tensor(self.step) * step + self.top
            tried = _level(reach / (high - low) * (x_NGE - low), 0, self.top)
            weighted = w_NGE * tried
            sum_l, sum_ll, sum_lx = (_sum(each)[..., None] for each in (weighted, weighted * tried, weighted * x_NGE))
            spread = sum_w * sum_ll - sum_l * sum_l
            new_scale, new_low = (sum_w * sum_lx - sum_x * sum_l) / spread, (sum_ll * sum_x - sum_l * sum_lx) / spread
            new_scale = torch.where(new_low > 0, sum_lx / sum_ll, new_scale)
            new_low = new_low.clamp(max=0)
            error = self._error(x_NGE, w_NGE, tried, new_scale, new_low)
            better = (spread > 0) & (error < best)
            scale, low = torch.where(better, new_scale, scale), torch.where(better, new_low, low)
            levels, best = torch.where(better, tried, levels), torch.where(better, error, best)
        return torch.where(flat, 0.0, scale), -low, torch.where(flat, 0.0, levels)

    def _error(self, x: Tensor, w: Tensor, levels: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        off = scale * levels + low - x
        return _sum(w * (off * off if self.squared else off.abs()))[..., None]


def _pack_mins(x: Tensor, w_NGE: Tensor, fit: _MinFit, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of Q2_K, Q4_K and Q5_K: d and dmin, (N, 1); scales and mins in 0..top, (N, G) bytes; levels, (N, 256) bytes."""
    x_NGE = x.view(w_NGE.shape)
    scale, low, levels = fit.of(x_NGE, w_NGE)
    ends = [torch.where(end > 0, end, 0.0) for end in (scale.amax(1), low.amax(1))]
    scales, mins = (
        _level(_ratio(top, end) * each[..., 0], 0, top) for end, each in zip(ends, (scale, low), strict=True)
    )
    d, dmin = ((end / top).to(torch.float16) for end in ends)
    step_NG1, low_NG1 = ((each.float() * part)[..., None] for each, part in ((d, scales), (dmin, mins)))
    again = _level((x_NGE + low_NG1) / step_NG1, 0, fit.top)
    levels = torch.where(step_NG1 == 0, levels, again)
    return torch.cat((d, dmin), dim=1).view(torch.uint8), _u8(scales), _u8(mins), _u8(levels).flatten(1)


def _own_weights(x_NGE: Tensor) -> Tensor:
    """How much each weight of Q4_K and Q5_K counts: its magnitude and its group's."""
    mean_square_NG = _sum(x_NGE * x_NGE) / x_NGE.shape[-1]
    # In float64 and back: torch's own float32 root may be a bit off the nearest number.
    return mean_square_NG.double().sqrt().float()[..., None] + x_NGE.abs()


def _six_bit_bytes(scales_N8: Tensor, mins_N8: Tensor) -> Tensor:
    (s, s_high), (m, m_high) = scales_N8.chunk(2, dim=1), mins_N8.chunk(2, dim=1)
    return torch.cat((s | s_high >> 4 << 6, m | m_high >> 4 << 6, s_high & 15 | (m_high & 15) << 4), dim=1)


def _pack_q4_k(x: Tensor) -> Tensor:
    w = _own_weights(x.view(-1, 8, 32))
    head, scales, mins, q = _pack_mins(x, w, _MinFit(15, -1.0, 0.1, 20, squared=True), 63)
    return torch.cat((head, _six_bit_bytes(scales, mins), _paired(q, 32)), dim=1)


def _pack_q5_k(x: Tensor) -> Tensor:
    w = _own_weights(x.view(-1, 8, 32))
    head, scales, mins, q = _pack_mins(x, w, _MinFit(31, -0.5, 0.1, 15, squared=True), 63)
    high = _gathered_bits((q >> 4).view(-1, 8, 32))
    return torch.cat((head, _six_bit_bytes(scales, mins), high, _paired(q, 32)), dim=1)


def _quarter_bytes(q_N256: Tensor) -> Tensor:
    return _gathered_bits((q_N256 & 3).view(-1, 2, 4, 32), 2).flatten(1)


def _pack_q2_k(x: Tensor) -> Tensor:
    x_NGE = x.view(-1, 16, 16)
    head, scales, mins, q = _pack_mins(x, x_NGE.abs(), _MinFit(3, -0.5, 0.1, 15, squared=False), 15)
    return torch.cat((scales | mins << 4, _quarter_bytes(q), head), dim=1)


def _fitted(x_NGE: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted by x²: the sums of x * level and level², (N, G, 1), whose ratio is the best scale."""
    w = x_NGE * x_NGE
    return _sum(w * x_NGE * levels)[..., None], _sum(w * levels * levels)[..., None]


def _pack_q3_k(x: Tensor) -> Tensor:
    x_NGE = x.view(-1, 16, 16)
    scale, levels = _swept(x_NGE)
    end = _extreme(scale[..., 0])
    inverse = _ratio(-32.0, end)
    scales = _level(inverse * scale[..., 0], -32, 31) + 32
    d = torch.where(end != 0, 1 / inverse, 0.0).to(torch.float16)
    scales = torch.where(end != 0, scales, 0.0)
    step = (d.float() * (scales - 32))[..., None]
    levels = torch.where(step == 0, levels, _level(x_NGE / step, -4, 3) + 4)
    q, s = _u8(levels).flatten(1), _u8(scales)
    packed = torch.cat((_paired(s & 15, 8), _gathered_bits((s >> 4).view(-1, 4, 4), 2)), dim=1)
    high = _gathered_bits((q >> 2).view(-1, 8, 32))
    return torch.cat((high, _quarter_bytes(q), packed, d.view(torch.uint8)), dim=1)


def _swept(x_NGE: Tensor) -> tuple[Tensor, Tensor]:
    """Q3_K's fit (ggml's make_q3_quants): scale, (N, G, 1), and levels + 4; each level in turn moves where it helps."""
    end = _extreme(x_NGE)
    zero = end.abs() < SMALLEST
    levels = _level(_ratio(-4.0, end) * x_NGE, -4, 3)
    sum_lx, sum_ll = (each[..., 0] for each in _fitted(x_NGE, levels))
    columns = list(levels.unbind(-1))
    for _ in range(5):
        for place, x in enumerate(x_NGE.unbind(-1)):
            w, old = x * x, columns[place]
            lx, ll = sum_lx - w * x * old, sum_ll - w * old * old
            new = _level(x * ll / lx, -4, 3)
            new_lx, new_ll = lx + w * x * new, ll + w * new * new
            helps = (lx > 0) & (new != old) & (new_ll > 0) & (new_lx * new_lx * sum_ll > sum_lx * sum_lx * new_ll)
            columns[place] = torch.where(helps, new, old)
            sum_lx, sum_ll = torch.where(helps, new_lx, sum_lx), torch.where(helps, new_ll, sum_ll)
    scale = torch.where(zero, 0.0, _ratio(sum_lx, sum_ll)[..., None])
    return scale, torch.where(zero, 0.0, torch.stack(columns, dim=-1) + 4)


def _pack_q6_k(x: Tensor) -> Tensor:
    x_NGE = x.view(-1, 16, 16)
    scale, levels = _searched(x_NGE)
    end = _extreme(scale[..., 0])
    zero = end.abs() < SMALLEST
    inverse = torch.where(zero, 0.0, _over(-128.0, end))
    scales = _level(inverse * scale[..., 0], -128, 127)
    d = torch.where(zero, 0.0, 1 / inverse).to(torch.float16)
    step = (d.float() * scales)[..., None]
    levels = torch.where(step == 0, levels, _level(x_NGE / step, -32, 31) + 32)
    q = torch.where(zero, 0, _u8(levels).flatten(1))
    head = torch.cat((_paired(q & 15, 64), _quarter_bytes(q >> 4)), dim=1)
    return torch.cat((head, scales.to(torch.int8).view(torch.uint8), d.view(torch.uint8)), dim=1)


def _searched(x_NGE: Tensor) -> tuple[Tensor, Tensor]:
    """Q6_K's fit (ggml's make_qx_quants): scale, (N, G, 1), and levels + 32, the best of nineteen divisors."""
    end = _extreme(x_NGE)
    levels = _level(_over(-32.0, end) * x_NGE, -32, 31)
    sum_lx, sum_ll = _fitted(x_NGE, levels)
    scale = _ratio(sum_lx, sum_ll)
    best = scale * sum_lx
    for step in (*range(-9, 0), *range(1, 10)):
        tried = _level(-(32 + torch.tensor(0.1) * step) / end * x_NGE, -32, 31)
        sum_lx, sum_ll = _fitted(x_NGE, tried)
        better = (sum_ll > 0) & (sum_lx * sum_lx > best * sum_ll)
        scale = torch.where(better, sum_lx / sum_ll, scale)
        levels, best = torch.where(better, tried, levels), torch.where(better, scale * sum_lx, best)
    zero = end.abs() < SMALLEST
    return torch.where(zero, 0.0, scale), torch.where(zero, 0.0, levels + 32)


_PACK: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _pack_q4_0,
    "Q4_1": _pack_q4_1,
    "Q5_0": _pack_q5_0,
    "Q5_1": _pack_q5_1,
    "Q8_0": _pack_q8_0,
    "Q2_K": _pack_q2_k,
    "Q3_K": _pack_q3_k,
    "Q4_K": _pack_q4_k,
    "Q5_K": _pack_q5_k,
    "Q6_K": _pack_q6_k,
}
