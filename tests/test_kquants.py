"""The K-quants' bytes against a second implementation: plain loops over numpy's float32 scalars, one number after the
other, written from the description of ggml's reference quantiser (make_qkx2_quants, make_q3_quants, make_qx_quants)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pumice import packing
from pumice.quant import FORMATS

F = np.float32
Row = list[F]


def nint(x: F) -> int:
    """Half to even, as ggml reads it out of the mantissa of x + 12582912."""
    bits = int((F(x) + F(12582912.0)).view(np.uint32))
    return (bits & 0x007FFFFF) - 0x00400000


def clamped(value: int, least: int, most: int) -> int:
    return max(least, min(most, value))


def half(x: F) -> tuple[bytes, F]:
    """The bytes of a half-precision number, and the number."""
    rounded = np.float16(x)
    return rounded.tobytes(), F(rounded)


def fit_with_min(x: Row, w: Row, top: int, first: float, steps: int, *, by_distance: bool) -> tuple[F, list[int], F]:
    low, high, sum_w, sum_x = x[0], x[0], w[0], w[0] * x[0]
    for value, weight in zip(x[1:], w[1:]):
        low, high = min(low, value), max(high, value)
        sum_w, sum_x = sum_w + weight, sum_x + weight * value
    low = min(low, F(0))
    if high == low:
        return F(0), [0] * len(x), -low

    def error(levels: list[int], scale: F, least: F) -> F:
        total = F(0)
        for value, weight, level in zip(x, w, levels):
            off = scale * F(level) + least - value
            total = total + weight * (abs(off) if by_distance else off * off)
        return total

    divisor = F(top) / (high - low)
    scale = F(1) / divisor
    levels = [clamped(nint(divisor * (value - low)), 0, top) for value in x]
    best = error(levels, scale, low)
    for step in range(steps + 1):
        divisor = (F(first) + F(0.1) * F(step) + F(top)) / (high - low)
        tried = [clamped(nint(divisor * (value - low)), 0, top) for value in x]
        sum_l = sum_ll = sum_lx = F(0)
        for value, weight, level in zip(x, w, tried):
            sum_l = sum_l + weight * F(level)
            sum_ll = sum_ll + weight * F(level) * F(level)
            sum_lx = sum_lx + weight * F(level) * value
        spread = sum_w * sum_ll - sum_l * sum_l
        if spread > 0:
            new_scale = (sum_w * sum_lx - sum_x * sum_l) / spread
            new_low = (sum_ll * sum_x - sum_l * sum_lx) / spread
            if new_low > 0:
                new_low, new_scale = F(0), sum_lx / sum_ll
            found = error(tried, new_scale, new_low)
            if found < best:
                levels, best, scale, low = tried, found, new_scale, new_low
    return scale, levels, -low


def extreme(values: Row) -> F:
    found, largest = F(0), F(0)
    for value in values:
        if abs(value) > largest:
            largest, found = abs(value), value
    return found


def fit_q3(x: Row) -> tuple[F, list[int]]:
    end = extreme(x)
    if abs(end) < F(1e-15):
        return F(0), [0] * len(x)
    inverse = F(-4) / end
    levels = [clamped(nint(inverse * value), -4, 3) for value in x]
    sum_lx = sum_ll = F(0)
    for value, level in zip(x, levels):
        w = value * value
        sum_lx, sum_ll = sum_lx + w * value * F(level), sum_ll + w * F(level) * F(level)
    for _ in range(5):
        changed = False
        for place, value in enumerate(x):
            w, old = value * value, levels[place]
            lx = sum_lx - w * value * F(old)
            if not lx > 0:
                continue
            ll = sum_ll - w * F(old) * F(old)
            new = clamped(nint(value * ll / lx), -4, 3)
            if new == old:
                continue
            lx, ll = lx + w * value * F(new), ll + w * F(new) * F(new)
            if ll > 0 and lx * lx * sum_ll > sum_lx * sum_lx * ll:
                levels[place], sum_lx, sum_ll, changed = new, lx, ll, True
        if not changed:
            break
    return (sum_lx / sum_ll if sum_ll > 0 else F(0)), [level + 4 for level in levels]


def fit_q6(x: Row) -> tuple[F, list[int]]:
    end = extreme(x)
    if abs(end) < F(1e-15):
        return F(0), [0] * len(x)

    def sums(inverse: F) -> tuple[list[int], F, F]:
        levels, sum_lx, sum_ll = [clamped(nint(inverse * value), -32, 31) for value in x], F(0), F(0)
        for value, level in zip(x, levels):
            w = value * value
            sum_lx, sum_ll = sum_lx + w * value * F(level), sum_ll + w * F(level) * F(level)
        return levels, sum_lx, sum_ll

    levels, sum_lx, sum_ll = sums(F(-32) / end)
    scale = sum_lx / sum_ll if sum_ll else F(0)
    best = scale * sum_lx
    for step in range(-9, 10):
        if step == 0:
            continue
        tried, sum_lx, sum_ll = sums(-(F(32) + F(0.1) * F(step)) / end)
        if sum_ll > 0 and sum_lx * sum_lx > best * sum_ll:
            levels, scale = tried, sum_lx / sum_ll
            best = scale * sum_lx
    return scale, [level + 32 for level in levels]


def groups(x: Row, size: int) -> list[Row]:
    return [x[at : at + size] for at in range(0, 256, size)]


def with_mins(
    x: Row, size: int, top: int, ends: int, fit: Callable[[Row], tuple[F, list[int], F]]
) -> tuple[bytes, list[int], list[int], list[int]]:
    found = [fit(group) for group in groups(x, size)]
    most_scale, most_min = (max([F(0), *(each[at] for each in found)]) for at in (0, 2))
    scale_in = F(ends) / most_scale if most_scale > 0 else F(0)
    min_in = F(ends) / most_min if most_min > 0 else F(0)
    scales = [min(ends, nint(scale_in * scale) & 255) for scale, _, _ in found]  # bytes without a sign, as there
    mins = [min(ends, nint(min_in * low) & 255) for _, _, low in found]
    (d_bytes, d), (dmin_bytes, dmin) = half(most_scale / F(ends)), half(most_min / F(ends))
    levels: list[int] = []
    for group, (_, own, _), scale, low in zip(groups(x, size), found, scales, mins):
        step, least = d * F(scale), dmin * F(low)
        levels += own if step == 0 else [clamped(nint((value + least) / step), 0, top) for value in group]
    return d_bytes + dmin_bytes, scales, mins, levels


def own_weights(x: Row) -> Row:
    total = F(0)
    for value in x:
        total = total + value * value
    mean = np.sqrt(total / F(len(x)))
    return [mean + abs(value) for value in x]


def six_bits(scales: list[int], mins: list[int]) -> bytes:
    packed = [0] * 12
    for k in range(4):
        packed[k] = scales[k] | (scales[k + 4] >> 4) << 6
        packed[k + 4] = mins[k] | (mins[k + 4] >> 4) << 6
        packed[k + 8] = scales[k + 4] & 15 | (mins[k + 4] & 15) << 4
    return bytes(packed)


def nibbles(levels: list[int]) -> bytes:
    return bytes(
        levels[64 * group + at] & 15 | (levels[64 * group + 32 + at] & 15) << 4
        for group in range(4)
        for at in range(32)
    )


def quarters(levels: list[int]) -> bytes:
    return bytes(
        sum((levels[128 * side + 32 * k + at] & 3) << 2 * k for k in range(4)) for side in range(2) for at in range(32)
    )


def q2_k(x: Row) -> bytes:
    head, scales, mins, levels = with_mins(
        x, 16, 3, 15, lambda g: fit_with_min(g, [abs(each) for each in g], 3, -0.5, 15, by_distance=True)
    )
    return bytes(s | m << 4 for s, m in zip(scales, mins)) + quarters(levels) + head


def q4_k(x: Row) -> bytes:
    head, scales, mins, levels = with_mins(
        x, 32, 15, 63, lambda g: fit_with_min(g, own_weights(g), 15, -1.0, 20, by_distance=False)
    )
    return head + six_bits(scales, mins) + nibbles(levels)


def q5_k(x: Row) -> bytes:
    head, scales, mins, levels = with_mins(
        x, 32, 31, 63, lambda g: fit_with_min(g, own_weights(g), 31, -0.5, 15, by_distance=False)
    )
    fifth = bytes(sum((levels[32 * group + at] >> 4) << group for group in range(8)) for at in range(32))
    return head + six_bits(scales, mins) + fifth + nibbles(levels)


def q3_k(x: Row) -> bytes:
    found = [fit_q3(group) for group in groups(x, 16)]
    end = extreme([scale for scale, _ in found])
    codes, d_bytes, d = [0] * 16, b"\0\0", F(0)
    if end != 0:
        inverse = F(-32) / end
        codes = [clamped(nint(inverse * scale), -32, 31) + 32 for scale, _ in found]
        d_bytes, d = half(F(1) / inverse)
    levels: list[int] = []
    for group, (_, own), code in zip(groups(x, 16), found, codes):
        step = d * F(code - 32)
        levels += own if step == 0 else [clamped(nint(value / step), -4, 3) + 4 for value in group]
    high = bytes(sum((levels[32 * k + at] >> 2) << k for k in range(8)) for at in range(32))
    low_codes = bytes(codes[k] & 15 | (codes[k + 8] & 15) << 4 for k in range(8))
    high_codes = bytes(sum((codes[4 * k + at] >> 4) << 2 * k for k in range(4)) for at in range(4))
    return high + quarters(levels) + low_codes + high_codes + d_bytes


def q6_k(x: Row) -> bytes:
    found = [fit_q6(group) for group in groups(x, 16)]
    end = extreme([scale for scale, _ in found])
    if abs(end) < F(1e-15):
        return bytes(210)
    inverse = F(-128) / end
    d_bytes, d = half(F(1) / inverse)
    scales = [min(127, nint(inverse * scale)) for scale, _ in found]
    levels: list[int] = []
    for group, (_, own), scale in zip(groups(x, 16), found, scales):
        step = d * F(scale)
        levels += own if step == 0 else [clamped(nint(value / step), -32, 31) + 32 for value in group]
    low, high = bytearray(128), bytearray(64)
    for side in range(2):
        for at in range(32):
            a, b, c, e = (levels[128 * side + 32 * k + at] for k in range(4))
            low[64 * side + at], low[64 * side + 32 + at] = a & 15 | (c & 15) << 4, b & 15 | (e & 15) << 4
            high[32 * side + at] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (e >> 4) << 6
    return bytes(low) + bytes(high) + bytes(scale & 255 for scale in scales) + d_bytes


SECOND = {"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}


def blocks() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Noise over ten decades, heavy tails, outliers, groups of zeros, one sign, constants, whole and half numbers; and
    what no half-precision scale can hold: denormal numbers and a huge one."""
    random = np.random.default_rng(0)
    x = random.standard_normal((132, 256)) * np.logspace(-6, 4, 132)[:, None]
    x[1::11] = random.standard_t(2, (12, 256)) * 0.02
    x[2::11, random.integers(0, 256, 12)] *= 300
    x[3::11, 32:96] = 0
    x[4::11] = abs(x[4::11])
    x[5::11] = -abs(x[5::11]) - 0.01
    x[6::11] = random.integers(-8, 9, (12, 256)) / 2
    x[7::11, ::3] = 0
    x[8::11] *= np.repeat(10.0 ** random.integers(-5, 3, (12, 16)), 16, axis=1)
    x[9], x[20], x[31], x[42] = 0, 3.25, -1.5, np.tile([1.0, -1.0], 128)
    x[53], x[64, :128], x[75, 1:] = np.arange(256) / 2 - 64, 0.7, 0
    x[86], x[97] = x[86] * 1e-40, x[97] * 1e-20
    x[108, 200] = 3e6
    return x.astype(np.float32)


@pytest.mark.parametrize("name", SECOND)
def test_two_implementations_write_the_same_bytes(name: str) -> None:
    x = blocks()
    found = packing.quantised(torch.from_numpy(x), FORMATS[name]).data_RB.numpy()
    with np.errstate(all="ignore"):
        wrong = [row for row, each in enumerate(x) if SECOND[name](list(each)) != found[row].tobytes()]
    assert not wrong
