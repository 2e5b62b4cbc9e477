"""The C++ kernels: each against its definition in PyTorch, on every instruction set that this CPU has, and by name the
ones that it would not choose."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from pumice.config import Rotary
from pumice.ops import cpu, reference
from pumice.ops.cpu import Blocks, BlocksShape, BlockWeights, Pages
from pumice.ops.library import INSTRUCTION_SETS, library
from pumice.ops.pages import LayerPages
from pumice.quant import FORMATS, QTensor

ROTARY = Rotary(1e4)
BLOCKS = [name for name, each in FORMATS.items() if each.dtype is None]
SCALES_AT = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
TILED_ROWS = 48  # from so many on AMX rounds to bfloat16
TOP_SHARE = {"Q4_0": 4095, "Q4_1": 4095, "Q5_0": 4095, "Q5_1": 2047}  # what AVX2 makes of the greatest scale
SETS = [name for name, number in INSTRUCTION_SETS.items() if number <= library().pumice_best_isa()]


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    number = INSTRUCTION_SETS[request.param]
    monkeypatch.setattr(cpu, "instruction_set", lambda: number)
    return str(request.param)


def matrix(name: str, rows: int, columns: int, seed: int = 0) -> QTensor:
    """Random bytes with scales of a sane size: every bit of every field takes part."""
    draw = torch.Generator().manual_seed(seed)
    format = FORMATS[name]
    count = rows * columns // format.block_weights
    data_NB = torch.randint(0, 256, (count, format.block_bytes), dtype=torch.uint8, generator=draw)
    for at in SCALES_AT[name]:
        scale_N1 = (torch.rand(count, 1, generator=draw) - 0.5) * 0.02
        data_NB[:, at : at + 2] = scale_N1.half().view(torch.uint8)
    return QTensor(data_NB.view(rows, -1), format)


def rounded(x_MK: Tensor, group: int, most_level: float = 127) -> Tensor:
    """What the kernels make of activations: whole levels of a scale for each group."""
    columns = x_MK.shape[1]
    x_MGE = torch.nn.functional.pad(x_MK, (0, -columns % group)).unflatten(-1, (-1, group))
    most_MG1 = x_MGE.abs().amax(-1, keepdim=True)
    inverse_MG1 = torch.where(most_MG1 > 0, torch.tensor(most_level) / most_MG1, 0.0)
    return (torch.round(x_MGE * inverse_MG1) * (most_MG1 / most_level)).flatten(-2)[:, :columns]


def in_shares(numbers_RN: Tensor, top: int) -> Tensor:
    """Each eight of a row as whole multiples of a share of their greatest, which has `top` of them."""
    count = numbers_RN.shape[1]
    numbers_RGE = torch.nn.functional.pad(numbers_RN, (0, -count % 8)).unflatten(-1, (-1, 8))
    most_RG1 = numbers_RGE.abs().amax(-1, keepdim=True)
    return (torch.round(numbers_RGE * (torch.tensor(float(top)) / most_RG1)) * (most_RG1 / top)).flatten(-2)[:, :count]


def with_whole_scales(weight: QTensor, top: int) -> Tensor:
    """The weights as AVX2 multiplies them with many rows (docs/kernels.md): blocks of 32, some with offsets."""
    blocks_RNB = weight.data_RB.unflatten(-1, (-1, weight.format.block_bytes))
    numbers_RN2 = blocks_RNB[..., :4].contiguous().view(torch.float16).float()
    scale_RN, offset_RN = numbers_RN2[..., 0], numbers_RN2[..., 1]
    if not weight.format.name.endswith("_1"):
        offset_RN = torch.zeros_like(scale_RN)
    levels_RNE = weight.dense().unflatten(-1, (-1, 32)) - offset_RN[..., None]
    ratio_RN = torch.where(scale_RN == 0, 0.0, in_shares(scale_RN, top) / scale_RN)
    return (levels_RNE * ratio_RN[..., None] + in_shares(offset_RN, 32767).nan_to_num()[..., None]).flatten(-2)


def far(given: Tensor, expected: Tensor) -> float:
    return float((given.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", BLOCKS)
def test_products_are_those_of_the_rounded_activations(name: str, instruction_set: str) -> None:
    whole = name.endswith("_K")
    shapes = [(48, 512), (37, 768), (960, 512)] + ([] if whole else [(16, 96), (20, 288), (5, 32), (549, 288)])
    draw = torch.Generator().manual_seed(1)
    for rows, columns in shapes:
        weight = matrix(name, rows, columns)
        for m in (3, 8, 47, 50) if rows > 500 else (1, 2, 3, 4, 5, 8, 13, 31, 40, 47, 48, 66):
            x_MK = torch.randn(m, columns, generator=draw) * torch.logspace(-3, 3, m)[:, None]
            bias_N = torch.randn(rows, generator=draw)
            (y_MN,) = cpu.linears(x_MK, [weight], [bias_N])
            # Beside many rows AVX2 makes all scales whole: see docs/kernels.md.
            shared = instruction_set == "avx2" and m > 2
            most_level = 1023 if shared and name in ("Q8_0", "IQ4_NL") else 127
            x_rounded_MK = rounded(x_MK, 256 if whole or shared else 32, most_level)
            dense_NK, near = weight.dense(), 3e-6
            if shared and name in TOP_SHARE:
                dense_NK = with_whole_scales(weight, TOP_SHARE[name])
            elif shared and not whole:
                near = 5e-4
            if instruction_set == "amx" and m >= TILED_ROWS:
                x_rounded_MK, dense_NK, near = x_MK.bfloat16(), dense_NK.bfloat16(), 3e-5
            expected_MN = x_rounded_MK.double() @ dense_NK.double().T + bias_N
            for row in range(m):
                assert far(y_MN[row], expected_MN[row]) < near, (rows, columns, m, row)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_row_is_the_same_beside_any_others(name: str, instruction_set: str) -> None:
    """Bit by bit, among up to two rows and among more (with AMX: up to 47, and more): how many others a row has moves
    nothing."""
    x_MK = torch.randn(66, 768, generator=torch.Generator().manual_seed(11))
    weight = matrix(name, 37, 768)
    tiled = instruction_set == "amx"
    more = ((3, 4, 6, 8, 9, 13, 47), (48, 49, 64, 65, 66)) if tiled else ((3, 4, 5, 6, 7, 8, 12, 13, 31, 47, 48, 66),)
    for counts in ((1, 2), *more):
        (most_MN,) = cpu.linears(x_MK[: counts[-1]], [weight], [None])
        for m in counts:
            for first in (0, counts[-1] - m):
                (y_MN,) = cpu.linears(x_MK[first : first + m], [weight], [None])
                assert torch.equal(y_MN, most_MN[first : first + m]), (m, first)


@pytest.mark.skipif("amx" not in SETS, reason="this CPU has no AMX")
@pytest.mark.parametrize("name", BLOCKS)
def test_tiles_of_bytes_give_what_vectors_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, below the rows that are rounded to bfloat16."""
    draw = torch.Generator().manual_seed(12)
    for rows, columns in [(37, 768), (960, 512)] + ([] if name.endswith("_K") else [(20, 288)]):
        weight, given = matrix(name, rows, columns), {}
        for m in (3, 8, 9, TILED_ROWS - 1):
            x_MK = torch.randn(m, columns, generator=draw)
            for each in ("avx512", "amx"):
                monkeypatch.setattr(cpu, "instruction_set", lambda each=each: INSTRUCTION_SETS[each])
                (given[each],) = cpu.linears(x_MK, [weight], [None])
            assert torch.equal(given["amx"], given["avx512"]), (rows, columns, m)


@pytest.mark.parametrize("name", BLOCKS)
def test_any_bytes_are_blocks(name: str, instruction_set: str) -> None:
    """A file may hold anything: scales that are no number or have no end spoil their row, and no other."""
    draw, format = torch.Generator().manual_seed(9), FORMATS[name]
    data_RB = torch.randint(0, 256, (600, format.row_bytes(512)), dtype=torch.uint8, generator=draw)
    weight = QTensor(data_RB, format)
    whole_N = weight.dense().isfinite().all(1)
    assert 100 < whole_N.sum() < 600
    for m in (1, 3, 12, 50):
        (y_MN,) = cpu.linears(torch.randn(m, 512, generator=draw), [weight], [None])
        assert torch.equal(y_MN.isfinite(), whole_N.expand(m, -1))


@pytest.mark.parametrize("name", BLOCKS)
def test_products_are_near_the_definition(name: str, instruction_set: str) -> None:
    """Rounding activations costs a known part of a percent (docs/kernels.md)."""
    weight, x_MK = matrix(name, 64, 1024), torch.randn(50, 1024, generator=torch.Generator().manual_seed(2))
    for m in (16, 50):
        (y_MN,) = cpu.linears(x_MK[:m], [weight], [None])
        in_tiles = instruction_set == "amx" and m >= TILED_ROWS
        assert far(y_MN, reference.linear(x_MK[:m], weight.dense(), None)) < (0.003 if in_tiles else 0.008)


@pytest.mark.parametrize("m", [1, 3, 20, 50])
def test_heads_of_llama_cpp_are_turned_on_their_way(m: int, instruction_set: str) -> None:
    draw = torch.Generator().manual_seed(7)
    for name, columns, rows in (("Q4_0", 64, 72), ("Q6_K", 256, 72), ("Q4_0", 64, 528)):
        x_MK, bias_N = torch.randn(m, columns, generator=draw), torch.randn(rows, generator=draw)
        straight = matrix(name, rows, columns)
        turned = QTensor(straight.data_RB, straight.format, head_width=24)
        heads, halves = range(0, rows, 24), (0, 1)
        order = torch.tensor([head + 2 * pair + half for head in heads for half in halves for pair in range(12)])
        assert torch.equal(turned.dense(), straight.dense()[order])
        assert torch.equal(turned.rows(torch.tensor([1, 30])), straight.dense()[order[[1, 30]]])
        expected_MN = cpu.linears(x_MK, [straight], [None])[0][:, order] + bias_N
        assert torch.equal(cpu.linears(x_MK, [turned], [bias_N])[0], expected_MN)


def test_several_matrices_share_their_input() -> None:
    x_2TD = torch.randn(2, 7, 512, generator=torch.Generator().manual_seed(3))
    weights = [matrix("Q4_K", 40, 512), matrix("Q6_K", 24, 512), matrix("Q4_0", 100, 512)]
    together = cpu.linears(x_2TD, weights, [None] * 3)
    for y_2TF, weight in zip(together, weights):
        assert y_2TF.shape == (2, 7, weight.shape[0])
        assert torch.equal(y_2TF, cpu.linears(x_2TD, [weight], [None])[0])


@pytest.mark.parametrize("rows", [(5000,), (1500, 700, 2900), (3000, 8, 1), (1, 64, 65, 4097)])
@pytest.mark.parametrize("m", [1, 2, 8, 50])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_row_has_its_turn(threads: int, m: int, rows: tuple[int, ...], instruction_set: str) -> None:
    """Threads take spans of rows, shorter and shorter, across matrices; together these are all rows."""
    x_MK = torch.randn(m, 32, generator=torch.Generator().manual_seed(3))
    weights = [matrix("Q8_0", each, 32, each) for each in rows]
    pieces = [[QTensor(data_RB, each.format) for data_RB in each.data_RB.split(64)] for each in weights]
    expected = [torch.cat([cpu.linears(x_MK, [piece], [None])[0] for piece in each], -1) for each in pieces]
    torch.set_num_threads(threads)
    try:
        given = cpu.linears(x_MK, weights, [None] * len(rows))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True))


def test_short_rows_read_nothing_left_over(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the kernels are lent holds anything: here what is no number."""

    def dirty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype).fill_(255 if dtype == torch.uint8 else float("nan"))

    monkeypatch.setattr(cpu, "_room", dirty)
    for name in ("Q4_0", "Q5_1", "Q8_0", "Q4_K"):
        for columns in (256,) if name == "Q4_K" else (32, 96, 288):
            for m in (1, 3, 12, 37, 50):
                x_MK = torch.randn(m, columns, generator=torch.Generator().manual_seed(m))
                assert cpu.linears(x_MK, [matrix(name, 5, columns)], [None])[0].isfinite().all()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is taken away as Linux does it")
@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_is_read_behind_the_weights(name: str, instruction_set: str) -> None:
    """Their last byte is the last of its page, and the next page is not to be read."""
    for rows, columns in ((5, 256), (33, 512), (97, 256)) if name.endswith("_K") else ((5, 32), (33, 288), (97, 96)):
        weight = matrix(name, rows, columns)
        size, page = weight.data_RB.numel(), mmap.PAGESIZE
        readable = -(-size // page) * page
        memory = mmap.mmap(-1, readable + page)
        behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + readable
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), ctypes.c_size_t(page), 0) == 0
        data_B = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=readable - size)
        data_B.copy_(weight.data_RB.flatten())
        at_the_end = QTensor(data_B.view_as(weight.data_RB), weight.format)
        for m in (1, 2, 3, 9, TILED_ROWS - 1, TILED_ROWS):
            x_MK = torch.randn(m, columns, generator=torch.Generator().manual_seed(m))
            assert torch.equal(cpu.linears(x_MK, [at_the_end], [None])[0], cpu.linears(x_MK, [weight], [None])[0])


def test_odd_inputs() -> None:
    weight = matrix("Q4_K", 40, 512)
    assert cpu.linears(torch.empty(0, 512), [weight], [None])[0].shape == (0, 40)
    assert torch.equal(cpu.linears(torch.zeros(9, 512), [weight], [None])[0], torch.zeros(9, 40))
    x_MK = torch.randn(3, 512)
    narrow_MK = x_MK.bfloat16()
    (y_MN,) = cpu.linears(narrow_MK, [weight], [None])
    assert torch.equal(y_MN, cpu.linears(narrow_MK.float(), [weight], [None])[0].bfloat16())
    strided_MK = torch.randn(512, 12).T
    assert torch.equal(
        cpu.linears(strided_MK, [weight], [None])[0], cpu.linears(strided_MK.contiguous(), [weight], [None])[0]
    )


def test_least_levels_of_q8_0(instruction_set: str) -> None:
    """-128 is in no file that a quantiser wrote, and must not overflow."""
    data_B = torch.tensor([0x3C00], dtype=torch.int16).view(torch.uint8).repeat(8, 1)
    weight = QTensor(torch.cat((data_B, torch.full((8, 32), 128, dtype=torch.uint8)), dim=1), FORMATS["Q8_0"])
    for m in (1, 12, 50):
        (y_MN,) = cpu.linears(torch.full((m, 32), -1.0), [weight], [None])
        assert torch.allclose(y_MN, torch.full((m, 8), 4096.0))


def test_small_operations(instruction_set: str) -> None:
    draw = torch.Generator().manual_seed(4)
    for shape in ((1, 1, 64), (2, 3, 40), (70, 100)):
        x, weight = torch.randn(*shape, generator=draw) * 9, torch.randn(shape[-1], generator=draw)
        assert far(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)) < 1e-6
        up = torch.randn(*shape, generator=draw)
        assert far(cpu.gated_mlp(x * 4, up), reference.gated_mlp(x * 4, up)) < 1e-6
    big = torch.tensor([-1e30, -100.0, -90.0, 0.0, 90.0, 100.0, 1e30, 3.0])
    assert torch.allclose(cpu.gated_mlp(big, torch.ones(8)), reference.gated_mlp(big, torch.ones(8)), atol=1e-35)
    for width in (8, 24, 64):
        x_BHTE = torch.randn(2, 3, 5, width, generator=draw)
        angle_BTE = torch.rand(1, 5, width, generator=draw) * 6
        turn = (angle_BTE.cos(), angle_BTE.sin())
        assert far(cpu.rotate(x_BHTE, *turn), reference.rotate(x_BHTE, *turn)) < 1e-6


@pytest.mark.parametrize("type", list(cpu.KEY_TYPES))
def test_attention(type: torch.dtype, instruction_set: str) -> None:
    draw = torch.Generator().manual_seed(5)
    for rows, heads, shared, tokens, positions, width in (
        (1, 4, 4, 1, 1, 16),
        (2, 6, 2, 3, 37, 64),
        (3, 2, 1, 1, 500, 24),
        (1, 2, 2, 9, 9, 8),
        (2, 4, 2, 50, 77, 40),
        (1, 3, 1, 101, 101, 64),
        (1, 7, 1, 2, 70, 80),
        (2, 8, 2, 1, 33, 64),
    ):
        q_BHTE = torch.randn(rows, heads, tokens, width, generator=draw) * 3
        k_BKSE, v_BKSE = (torch.randn(rows, shared, positions, width, generator=draw).to(type) for _ in range(2))
        mask_BTS = torch.rand(rows, tokens, positions, generator=draw) < 0.7
        mask_BTS[..., 0] = True
        for mask in (None, mask_BTS):
            expected = reference.attention(q_BHTE, k_BKSE.float(), v_BKSE.float(), mask, False)
            assert far(cpu.attention(q_BHTE, k_BKSE, v_BKSE, mask), expected) < 2e-6
        if tokens == positions:
            expected = reference.attention(q_BHTE, k_BKSE.float(), v_BKSE.float(), None, True)
            assert far(cpu.attention(q_BHTE, k_BKSE, v_BKSE, None, True), expected) < 2e-6


class OneByOne:
    """The twin of `Blocks.run`: the same matrices, operation by operation."""

    def __init__(
        self, blocks: list[BlockWeights], shape: BlocksShape, keys: list[Tensor], values: list[Tensor]
    ) -> None:
        self.blocks, self.shape, self.keys, self.values = blocks, shape, keys, values

    def run(self, x_BTD: Tensor, turn: tuple[Tensor, Tensor], places_BT: Tensor) -> Tensor:
        shape, every_B1 = self.shape, torch.arange(len(x_BTD))[:, None]
        for index, block in enumerate(self.blocks):
            q, k, v, o, gate, up, down = block.matrices
            h_BTD = reference.rms_norm(x_BTD, block.norms[0], shape.eps)
            q_BHTE, k_BKTE, v_BKTE = (
                each.unflatten(-1, (-1, shape.head_width)).transpose(1, 2)
                for each in cpu.linears(h_BTD, [q, k, v], block.biases)
            )
            q_BHTE, k_BKTE = reference.rotate(q_BHTE, *turn), reference.rotate(k_BKTE, *turn)
            for kept, new in ((self.keys[index], k_BKTE), (self.values[index], v_BKTE)):
                kept[every_B1, :, places_BT] = new.transpose(1, 2).to(kept.dtype)
            distance_BTS = places_BT[..., None] - torch.arange(self.keys[index].shape[2])
            mask_BTS = (distance_BTS >= 0) & (distance_BTS < (shape.window or 10**6))
            keys, values = self.keys[index].float(), self.values[index].float()
            mixed_BHTE = reference.attention(q_BHTE, keys, values, mask_BTS, False)
            x_BTD = x_BTD + cpu.linears(mixed_BHTE.transpose(1, 2).flatten(2), [o], [None])[0]
            h_BTD = reference.rms_norm(x_BTD, block.norms[1], shape.eps)
            gated = reference.gated_mlp(*cpu.linears(h_BTD, [gate, up], [None, None]))
            x_BTD = x_BTD + cpu.linears(gated, [down], [None])[0]
        return x_BTD


@pytest.mark.parametrize("type", list(cpu.KEY_TYPES))
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("tokens", [1, 12])
def test_attention_in_pages(type: torch.dtype, window: int | None, tokens: int, instruction_set: str) -> None:
    """Rows of unequal lengths in shuffled pages, of which what nobody sees is no number: each query is attended by
    itself over keys that are gathered one by one."""
    draw = torch.Generator().manual_seed(8)
    rows, heads, kv_heads, width, size = 3, 4, 2, 32, 8
    table_RP = torch.randperm(12, generator=draw).view(rows, 4)
    keys, values = (torch.full((12, kv_heads, size, width), torch.nan).to(type) for _ in range(2))
    pages = LayerPages(keys, values, table_RP)
    k_BKLE, v_BKLE = (torch.randn(rows, kv_heads, 30, width, generator=draw).to(type) for _ in range(2))
    q_BHTE = torch.randn(rows, heads, tokens, width, generator=draw)
    lengths = torch.tensor([0, 7, 17])
    for row, length in enumerate(lengths.tolist()):
        alone = LayerPages(keys, values, table_RP[row : row + 1])
        places_1T = torch.arange(length + tokens)[None]
        reference.put(
            k_BKLE[row, None, :, : length + tokens], v_BKLE[row, None, :, : length + tokens], alone, places_1T
        )
    places_BT = lengths[:, None] + torch.arange(tokens)
    given = (cpu.attention_in_pages, reference.attention_in_pages)
    found = [attend(q_BHTE, pages, places_BT, window) for attend in given]
    for row in range(rows):
        for token in range(tokens):
            last = int(places_BT[row, token]) + 1
            first = 0 if window is None else max(0, last - window)
            k_1KSE, v_1KSE = (each[row, None, :, first:last].float() for each in (k_BKLE, v_BKLE))
            expected = reference.attention(q_BHTE[row, None, :, token, None], k_1KSE, v_1KSE, None, False)[0, :, 0]
            for each_BHTE in found:
                assert far(each_BHTE[row, :, token], expected) < 1e-5


@pytest.mark.parametrize("type", list(cpu.KEY_TYPES))
@pytest.mark.parametrize("window", [0, 6])
def test_blocks_at_once(type: torch.dtype, window: int, instruction_set: str) -> None:
    """All blocks in one call are the operations one by one; pages in any order hold what rows hold."""
    draw = torch.Generator().manual_seed(6)
    shape = BlocksShape(heads=4, kv_heads=2, head_width=64, ffn_width=512, window=window, eps=1e-5)
    rows, width, page, room = 3, 256, 8, 24

    def block(seed: int) -> BlockWeights:
        sizes = [(256, width), (128, width), (128, width), (width, 256), (512, width), (512, width), (width, 512)]
        matrices = [matrix("Q4_K" if i % 3 else "Q6_K", *size, seed=seed + i) for i, size in enumerate(sizes)]
        biases = [torch.randn(size[0], generator=draw) for size in sizes[:3]]
        return BlockWeights(matrices, biases, [torch.rand(width, generator=draw) for _ in range(2)])

    blocks = [block(0), block(10)]
    table_RP = torch.randperm(rows * room // page, generator=draw).view(rows, -1)
    kept = [torch.zeros(len(blocks), rows, 2, room, 64, dtype=type) for _ in range(2)]
    paged = [[torch.zeros(table_RP.numel(), 2, page, 64, dtype=type) for _ in blocks] for _ in range(2)]
    plain = OneByOne(blocks, shape, list(kept[0]), list(kept[1]))
    at_once = Blocks(blocks, shape)
    lengths = torch.tensor([0, 5, 2])
    for tokens in (2, 1, 2, 1, 1, 11):
        x_BTD = torch.randn(rows, tokens, width, generator=draw)
        places_BT = lengths[:, None] + torch.arange(tokens)
        turn = reference.rotary(places_BT, 64, ROTARY)
        expected_BTD = plain.run(x_BTD, turn, places_BT)
        given_BTD = at_once.run(x_BTD, turn, places_BT, Pages(paged[0], paged[1], table_RP))
        # Where a sum falls between two levels or two halves, the last bit of the one before decides; steps of bfloat16
        # are greater.
        tiled = instruction_set == "amx" and rows * tokens >= 32
        assert far(given_BTD, expected_BTD) < (1e-2 if tiled else 1e-4 if type == torch.float32 else 5e-3)
        lengths = lengths + tokens
    for each, rows_of_it in zip(paged, kept):
        for layer in range(len(blocks)):
            joined_RKSE = each[layer][table_RP].transpose(1, 2).flatten(2, 3)
            assert far(joined_RKSE, rows_of_it[layer]) < 1e-2


@pytest.mark.parametrize("window", [0, 20])
def test_a_long_row_part_by_part(window: int, instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts give what the whole gives, and the last position alone what it gives among all."""
    draw = torch.Generator().manual_seed(8)
    shape = BlocksShape(heads=8, kv_heads=4, head_width=32, ffn_width=256, window=window, eps=1e-5)
    widths = [(256, 256), (128, 256), (128, 256), (256, 256), (256, 256), (256, 256), (256, 256)]

    def block(seed: int) -> BlockWeights:
        matrices = [matrix("Q5_K", *each, seed=seed + i) for i, each in enumerate(widths)]
        return BlockWeights(matrices, [None] * 3, [torch.rand(256, generator=draw) for _ in range(2)])

    at_once, tokens = Blocks([block(0), block(10)], shape), 100
    x_1TD, places_1T = torch.randn(1, tokens, 256, generator=draw), torch.arange(tokens)[None]
    turn = reference.rotary(places_1T, 32, ROTARY)

    def pages() -> Pages:
        kept = ([torch.zeros(1, 4, 104, 32) for _ in range(2)] for _ in range(2))
        return Pages(*kept, torch.zeros(1, 1, dtype=torch.long))

    # Few and many rows go by different code: a sum between two levels may round the other way.
    near, whole = 0.02, pages()
    expected_1TD = at_once.run(x_1TD, turn, places_1T, whole)
    assert far(at_once.run(x_1TD, turn, places_1T, pages(), kept=1), expected_1TD[:, -1:]) < near
    monkeypatch.setattr(cpu, "MOST_POSITIONS", 50 if instruction_set == "amx" else 23)  # each part in tiles, or none
    parted = pages()
    assert far(at_once.run(x_1TD, turn, places_1T, parted), expected_1TD) < near
    assert far(at_once.run(x_1TD, turn, places_1T, parted, kept=1), expected_1TD[:, -1:]) < near
    for given, expected in ((parted.keys, whole.keys), (parted.values, whole.values)):
        for given_14SE, expected_14SE in zip(given, expected):
            assert far(given_14SE, expected_14SE) < near


def test_the_last_position_of_a_long_row(instruction_set: str) -> None:
    """Alone it needs memory for all positions, which the many before it did not."""
    draw, shape = torch.Generator().manual_seed(10), BlocksShape(2, 1, 16, 32, window=0, eps=1e-5)
    widths = [(32, 32), (16, 32), (16, 32), (32, 32), (32, 32), (32, 32), (32, 32)]
    matrices = [matrix("Q4_1", *each, seed=i) for i, each in enumerate(widths)]
    at_once = Blocks([BlockWeights(matrices, [None] * 3, [torch.rand(32, generator=draw) for _ in range(2)])], shape)
    kept = ([torch.randn(1, 1, 20000, 16, generator=draw)] for _ in range(2))
    pages = Pages(*kept, torch.zeros(1, 1, dtype=torch.long))
    x_1TD, places_1T = torch.randn(1, 12, 32, generator=draw), torch.arange(19988, 20000)[None]
    turn = reference.rotary(places_1T, 16, ROTARY)
    expected_1TD = at_once.run(x_1TD, turn, places_1T, pages)
    assert far(at_once.run(x_1TD, turn, places_1T, pages, kept=1), expected_1TD[:, -1:]) < 0.05


def test_a_named_instruction_set() -> None:
    """PUMICE_CPU is honoured or refused, never ignored."""

    def run(name: str) -> subprocess.CompletedProcess[str]:
        code = "from pumice.ops import library; print(library.instruction_set())"
        environment = {**os.environ, "PUMICE_CPU": name}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert run("portable").stdout == "0\n"
    assert "no instruction set" in run("neon5").stderr
