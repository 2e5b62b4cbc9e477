"""Triton's kernels: attention over pages, and products with matrices that stay in blocks. `gpu` calls them.

A kernel is compiled for its upper-case parameters and for the types of its pointers. Nothing is read back: what a
kernel does depends on data only inside it, so that it can be captured in a CUDA graph.

B rows · T query positions · H heads · G heads of a group · S positions of a page · E width of a head · M queries of a
program (T x G) · N keys, or rows of a matrix, of a program · U units, L lanes (see `_plane`) · X numbers of a product
Sources: Dao 2023 (FlashAttention-2, arXiv 2307.08691), the split over keys Dao et al. 2023 (Flash-Decoding); the bytes
of blocks: `quant`.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# --- attention --------------------------------------------------------------------------------------------------------


@triton.jit
def attend(
    q_ptr, keys_ptr, values_ptr, table_ptr, positions_ptr, out_ptr, reach_ptr,
    q_b, q_h, q_t, kept_n, kept_k, kept_s, table_r, positions_b, positions_t, heads, tokens, splits, scale,
    GROUP: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """One part of the keys for M queries that share a key head. Program (queries, row x key head, part).

    out: (splits, B, T, H, WIDTH), each part as if it were all there is. reach: (splits, B, T, H) float32, the logarithm
    to base 2 of what its scores add up to.
    """
    kv_heads = heads // GROUP
    row, kv_head, split = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads, tl.program_id(2)
    query_M = tl.program_id(0) * M + tl.arange(0, M)
    token_M, head_M = query_M // GROUP, kv_head * GROUP + query_M % GROUP
    asked_M, lane_E = token_M < tokens, tl.arange(0, E)
    place_M = tl.load(positions_ptr + row * positions_b + token_M * positions_t, mask=asked_M, other=-1)
    end, start = tl.max(place_M) + 1, 0
    if WINDOW > 0:
        start = tl.maximum(tl.min(tl.where(asked_M, place_M, end)) - WINDOW + 1, 0)
    part = tl.cdiv(tl.cdiv(end - start, splits), N) * N
    start += split * part
    end = tl.minimum(end, start + part)
    at_M1 = (row.to(tl.int64) * q_b + head_M * q_h + token_M * q_t)[:, None]
    wide_E = lane_E < WIDTH
    q_ME = tl.load(q_ptr + at_M1 + lane_E[None, :], mask=asked_M[:, None] & wide_E[None, :], other=0.0)
    most_M = tl.full((M,), float("-inf"), tl.float32)
    sum_M, mixed_ME = tl.zeros((M,), tl.float32), tl.zeros((M, E), tl.float32)
    for first in range(start, end, N):
        key_N = first + tl.arange(0, N)
        there_N = key_N < end
        page_N = tl.load(table_ptr + row * table_r + key_N // PAGE, mask=there_N, other=0).to(tl.int64)
        at_N = page_N * kept_n + kv_head * kept_k + (key_N % PAGE) * kept_s
        loaded_NE = there_N[:, None] & wide_E[None, :]
        k_NE = tl.load(keys_ptr + at_N[:, None] + lane_E[None, :], mask=loaded_NE, other=0.0)
        v_NE = tl.load(values_ptr + at_N[:, None] + lane_E[None, :], mask=loaded_NE, other=0.0)
        score_MN = tl.dot(q_ME, tl.trans(k_NE.to(q_ME.dtype)), input_precision="ieee") * (scale * LOG2_E)
        seen_MN = there_N[None, :] & (key_N[None, :] <= place_M[:, None])
        if WINDOW > 0:
            seen_MN = seen_MN & (key_N[None, :] > place_M[:, None] - WINDOW)
        score_MN = tl.where(seen_MN, score_MN, float("-inf"))
        new_M = tl.maximum(most_M, tl.max(score_MN, 1))
        base_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        share_MN, fade_M = tl.exp2(score_MN - base_M[:, None]), tl.exp2(most_M - base_M)
        sum_M = sum_M * fade_M + tl.sum(share_MN, 1)
        mixed_ME = mixed_ME * fade_M[:, None]
        mixed_ME += tl.dot(share_MN.to(q_ME.dtype), v_NE.to(q_ME.dtype), input_precision="ieee")
        most_M = new_M
    part_M = ((split * (tl.num_programs(1) // kv_heads) + row).to(tl.int64) * tokens + token_M) * heads + head_M
    whole_M = tl.where(sum_M == 0.0, 1.0, sum_M)
    mixed_ME = mixed_ME / whole_M[:, None]
    tl.store(out_ptr + part_M[:, None] * WIDTH + lane_E[None, :], mixed_ME, mask=asked_M[:, None] & wide_E[None, :])
    tl.store(reach_ptr + part_M, most_M + tl.log2(whole_M), mask=asked_M)


@triton.jit
def join(parts_ptr, reach_ptr, out_ptr, queries, splits, WIDTH: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """The parts of a query's keys, weighed by what their scores add up to. Program (query)."""
    query, part_P, lane_E = tl.program_id(0).to(tl.int64), tl.arange(0, P), tl.arange(0, E)
    reach_P = tl.load(reach_ptr + part_P * queries + query, mask=part_P < splits, other=float("-inf"))
    share_P = tl.exp2(reach_P - tl.max(reach_P))
    there_PE = (part_P < splits)[:, None] & (lane_E < WIDTH)[None, :]
    at_PE = (part_P[:, None] * queries + query) * WIDTH + lane_E[None, :]
    parts_PE = tl.load(parts_ptr + at_PE, mask=there_PE, other=0.0)
    mixed_E = tl.sum(parts_PE * share_P[:, None], 0) / tl.sum(share_P)
    tl.store(out_ptr + query * WIDTH + lane_E, mixed_E, mask=lane_E < WIDTH)


# --- blocks -----------------------------------------------------------------------------------------------------------


@triton.jit
def _half(byte_ptr):
    """The half-precision number at an even byte."""
    return tl.load(byte_ptr.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _six_bits(scales_ptr, sub):
    """Scale and min of a sub-block of Q4_K and Q5_K: see `quant._six_bit_pairs`."""
    late = sub >= 4
    early = tl.where(late, sub - 4, sub)
    first, second = tl.load(scales_ptr + early), tl.load(scales_ptr + early + 4)
    third = tl.load(scales_ptr + early + 8)
    scale = tl.where(late, (third & 15) | (first >> 6 << 4), first & 63)
    least = tl.where(late, (third >> 4) | (second >> 6 << 4), second & 63)
    return scale.to(tl.float32), least.to(tl.float32)


@triton.jit
def _plane_of_32(block_ptr, lane, PLANE: tl.constexpr, FORMAT: tl.constexpr):
    """`_plane` of the formats with blocks of 32."""
    d = _half(block_ptr)
    HAS_MIN: tl.constexpr = FORMAT == "Q4_1" or FORMAT == "Q5_1"
    HAS_FIFTH: tl.constexpr = FORMAT == "Q5_0" or FORMAT == "Q5_1"
    AFTER: tl.constexpr = 4 if HAS_MIN else 2
    if FORMAT == "Q8_0":
        level = tl.load((block_ptr + AFTER + lane).to(tl.pointer_type(tl.int8))).to(tl.float32)
    elif HAS_FIFTH:
        fifth = tl.load(block_ptr + AFTER + 2 * PLANE + lane // 8) >> (lane % 8).to(tl.uint8)
        q = ((tl.load(block_ptr + AFTER + 4 + lane) >> (4 * PLANE)) & 15) | (fifth & 1) << 4
        level = q.to(tl.float32) - (0.0 if HAS_MIN else 16.0)
    else:
        q = (tl.load(block_ptr + AFTER + lane) >> (4 * PLANE)) & 15
        if FORMAT == "IQ4_NL":
            # Eight levels in one number, a byte each; the lower eight with 128 added.
            packed = tl.where(q < 8, 0x766A5D4F3F2D1801, 0x7159453526190D01)
            byte = (packed >> ((q & 7) * 8).to(tl.int64)) & 255
            level = byte.to(tl.float32) - tl.where(q < 8, 128.0, 0.0)
        else:
            level = q.to(tl.float32) - (0.0 if HAS_MIN else 8.0)
    weight = level * d
    if HAS_MIN:
        weight += _half(block_ptr + 2)
    return weight


@triton.jit
def _plane_of_256(block_ptr, part, lane, PLANE: tl.constexpr, FORMAT: tl.constexpr):
    """`_plane` of the formats with blocks of 256: `part` says which unit of its block."""
    group = part * 8 + PLANE * 2 + lane // 16
    if FORMAT == "Q2_K":
        q = (tl.load(block_ptr + 16 + part * 32 + lane) >> (2 * PLANE)) & 3
        pair = tl.load(block_ptr + group)
        scale, least = (
            _half(block_ptr + 80) * (pair & 15).to(tl.float32),
            _half(block_ptr + 82) * (pair >> 4).to(tl.float32),
        )
        weight = q.to(tl.float32) * scale - least
    elif FORMAT == "Q3_K":
        q = (tl.load(block_ptr + 32 + part * 32 + lane) >> (2 * PLANE)) & 3
        q = q | ((tl.load(block_ptr + lane) >> (part * 4 + PLANE).to(tl.uint8)) & 1) << 2
        low = (tl.load(block_ptr + 96 + group % 8) >> (group // 8 * 4).to(tl.uint8)) & 15
        high = (tl.load(block_ptr + 104 + group % 4) >> (group // 4 * 2).to(tl.uint8)) & 3
        scale = (low | high << 4).to(tl.float32) - 32.0
        weight = (q.to(tl.float32) - 4.0) * (_half(block_ptr + 108) * scale)
    elif FORMAT == "Q6_K":
        q = (tl.load(block_ptr + part * 64 + (PLANE & 1) * 32 + lane) >> (4 * (PLANE >> 1))) & 15
        q = q | ((tl.load(block_ptr + 128 + part * 32 + lane) >> (2 * PLANE)) & 3) << 4
        scale = tl.load((block_ptr + 192 + group).to(tl.pointer_type(tl.int8))).to(tl.float32)
        weight = (q.to(tl.float32) - 32.0) * (_half(block_ptr + 208) * scale)
    else:
        tl.static_assert(FORMAT == "Q4_K" or FORMAT == "Q5_K")
        scale, least = _six_bits(block_ptr + 4, 2 * part + PLANE)
        q = (tl.load(block_ptr + (48 if FORMAT == "Q5_K" else 16) + part * 32 + lane) >> (4 * PLANE)) & 15
        if FORMAT == "Q5_K":
            q = q | ((tl.load(block_ptr + 16 + lane) >> (2 * part + PLANE).to(tl.uint8)) & 1) << 4
        weight = q.to(tl.float32) * (_half(block_ptr) * scale) - _half(block_ptr + 2) * least
    return weight


@triton.jit
def _plane(
    row_ptr, unit, lane, PLANE: tl.constexpr, FORMAT: tl.constexpr, BYTES: tl.constexpr, UNITS_OF_BLOCK: tl.constexpr
):
    """The weights of one plane of units: lane l of plane p of unit u is weight u * (planes * lanes) + p * lanes + l of
    the row. A unit is so much of a row as shares bytes: its planes are other bits of the same ones."""
    block_ptr = row_ptr + unit // UNITS_OF_BLOCK * BYTES
    if UNITS_OF_BLOCK == 1:
        weight = _plane_of_32(block_ptr, lane, PLANE, FORMAT)
    else:
        weight = _plane_of_256(block_ptr, unit % UNITS_OF_BLOCK, lane, PLANE, FORMAT)
    return weight


@triton.jit
def _stored(row, HEAD: tl.constexpr):
    """Where llama.cpp's order has a row of Transformers': see `quant.heads_turned`."""
    if HEAD > 0:
        at = row % HEAD
        row = row - at + at % (HEAD // 2) * 2 + at // (HEAD // 2)
    return row.to(tl.int64)


@triton.jit
def row_product(
    x_ptr, data_ptr, bias_ptr, out_ptr, rows, units, row_bytes,
    FORMAT: tl.constexpr, BYTES: tl.constexpr, UNITS_OF_BLOCK: tl.constexpr, PLANES: tl.constexpr, L: tl.constexpr,
    HEAD: tl.constexpr, N: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """One input times N rows of a matrix; all weights meet it in float32. Program (rows)."""
    row_N = tl.program_id(0) * N + tl.arange(0, N)
    row_ptr_N11 = data_ptr + (_stored(tl.minimum(row_N, rows - 1), HEAD) * row_bytes)[:, None, None]
    lane_11L, sum_NUL = tl.arange(0, L)[None, None, :], tl.zeros((N, U, L), tl.float32)
    for first in range(0, units, U):
        unit_1U1 = (first + tl.arange(0, U))[None, :, None]
        near_1U1 = tl.minimum(unit_1U1, units - 1)
        for plane in tl.static_range(PLANES):
            at_1UL = unit_1U1 * (PLANES * L) + plane * L + lane_11L
            x_1UL = tl.load(x_ptr + at_1UL, mask=unit_1U1 < units, other=0.0).to(tl.float32)
            sum_NUL += _plane(row_ptr_N11, near_1U1, lane_11L, plane, FORMAT, BYTES, UNITS_OF_BLOCK) * x_1UL
    sum_N = tl.sum(tl.sum(sum_NUL, 2), 1)
    if bias_ptr is not None:
        sum_N += tl.load(bias_ptr + row_N, mask=row_N < rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + row_N, sum_N, mask=row_N < rows)


@triton.jit
def product(
    x_ptr, data_ptr, bias_ptr, out_ptr, inputs, rows, units, row_bytes,
    FORMAT: tl.constexpr, BYTES: tl.constexpr, UNITS_OF_BLOCK: tl.constexpr, PLANES: tl.constexpr, L: tl.constexpr,
    HEAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """M inputs times N rows of a matrix, a tile of which is unpacked to the inputs' type. Program (rows, inputs)."""
    X: tl.constexpr = U * L
    row_N, input_M = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1) * M + tl.arange(0, M)
    row_ptr_N11 = data_ptr + (_stored(tl.minimum(row_N, rows - 1), HEAD) * row_bytes)[:, None, None]
    lane_11L, lane_X, sum_MN = tl.arange(0, L)[None, None, :], tl.arange(0, X), tl.zeros((M, N), tl.float32)
    width = units * (PLANES * L)
    x_ptr_M1 = x_ptr + (tl.minimum(input_M, inputs - 1).to(tl.int64) * width)[:, None]
    for first in range(0, units, U):
        unit_X = first + lane_X // L
        near_1U1 = tl.minimum(first + tl.arange(0, U), units - 1)[None, :, None]
        for plane in tl.static_range(PLANES):
            at_X = unit_X * (PLANES * L) + plane * L + lane_X % L
            x_MX = tl.load(x_ptr_M1 + at_X[None, :], mask=(unit_X < units)[None, :], other=0.0)
            w_NUL = _plane(row_ptr_N11, near_1U1, lane_11L, plane, FORMAT, BYTES, UNITS_OF_BLOCK)
            w_XN = tl.trans(tl.reshape(w_NUL, (N, X)).to(x_MX.dtype))
            sum_MN = tl.dot(x_MX, w_XN, sum_MN, input_precision="ieee")
    if bias_ptr is not None:
        sum_MN += tl.load(bias_ptr + row_N, mask=row_N < rows, other=0.0).to(tl.float32)[None, :]
    there_MN = (input_M < inputs)[:, None] & (row_N < rows)[None, :]
    tl.store(out_ptr + input_M[:, None].to(tl.int64) * rows + row_N[None, :], sum_MN, mask=there_MN)


@triton.jit
def unpack(
    data_ptr, ids_ptr, out_ptr, units, row_bytes,
    FORMAT: tl.constexpr, BYTES: tl.constexpr, UNITS_OF_BLOCK: tl.constexpr, PLANES: tl.constexpr, L: tl.constexpr,
    HEAD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Rows of a matrix as plain numbers. Program (row that is asked for, units)."""
    at = tl.program_id(0).to(tl.int64)
    row_ptr = data_ptr + _stored(tl.load(ids_ptr + at), HEAD) * row_bytes
    unit_U1, lane_1L = (tl.program_id(1) * U + tl.arange(0, U))[:, None], tl.arange(0, L)[None, :]
    there_U1 = unit_U1 < units
    near_U1 = tl.minimum(unit_U1, units - 1)
    for plane in tl.static_range(PLANES):
        w_UL = _plane(row_ptr, near_U1, lane_1L, plane, FORMAT, BYTES, UNITS_OF_BLOCK)
        at_UL = at * units * (PLANES * L) + unit_U1 * (PLANES * L) + plane * L + lane_1L
        tl.store(out_ptr + at_UL, w_UL, mask=there_U1 & (lane_1L < L))
