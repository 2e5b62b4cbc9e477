"""The C++ kernels of ops/native, called with tensors: products with weights in blocks, and small operations.

B rows · T query positions · S key positions · D, F widths · H heads · K key/value heads · E width of a head
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pumice.ops import sizes
from pumice.ops.library import CAttention, CBlock, CMatrix, CPages, CPass, instruction_set, library
from pumice.ops.pages import LayerPages, Pages
from pumice.quant import FORMATS, Format, QTensor

KEY_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MOST_POSITIONS = 1024
"""So many positions pass all blocks at once; a longer prompt is read part by part, in memory that does not grow."""
STRETCH = 2**20
"""Numbers that are packed at a time, so that they are widened to float32 in the same memory."""
PACKED = {name for name, each in FORMATS.items() if each.dtype is None and name != "IQ4_NL"}
"""The formats that the kernels write; they read all that are in blocks."""


def _room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that the kernels write, whatever the defaults of PyTorch are."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def _matrix(weight: QTensor, bias_F: Tensor | None, out_MF: Tensor | None) -> CMatrix:
    assert weight.format.dtype is None, f"there is no kernel for {weight.format.name}"
    rows, row_bytes = weight.data_RB.shape
    out = (None, 0) if out_MF is None else (out_MF.data_ptr(), out_MF.shape[1])
    bias = None if bias_F is None else bias_F.data_ptr()
    return CMatrix(weight.data_RB.data_ptr(), row_bytes, rows, *out, bias, weight.format.id, weight.head_width)


def _whole(weight: QTensor) -> QTensor:
    """The matrix with its rows one behind the other, as the kernels read them."""
    return weight if weight.data_RB.is_contiguous() else replace(weight, data_RB=weight.data_RB.contiguous())


def _plain(bias_F: Tensor | None) -> Tensor | None:
    return None if bias_F is None else bias_F.detach().to(torch.float32).contiguous()


def linears(x_TD: Tensor, weights: Sequence[QTensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """x Wᵀ + b for each matrix in blocks; the activations are rounded once, to eight bits (docs/kernels.md).

    x_TD: any leading shape; its type is the result's.
    """
    rows_MD = x_TD.reshape(-1, x_TD.shape[-1]).to(torch.float32).contiguous()
    m, k = rows_MD.shape
    for weight, bias_F in zip(weights, biases, strict=True):
        sizes.product(k, weight, bias_F)
    outs = [_room(m, weight.shape[0]) for weight in weights]
    if m:
        whole, plain = [_whole(each) for each in weights], [_plain(each) for each in biases]
        matrices = (CMatrix * len(outs))(*(_matrix(*each) for each in zip(whole, plain, outs)))
        isa, threads = instruction_set(), torch.get_num_threads()
        scratch = _room(library().pumice_scratch_bytes(isa, m, k, threads), dtype=torch.uint8)
        library().pumice_matmul(isa, matrices, len(outs), rows_MD.data_ptr(), k, m, k, threads, scratch.data_ptr())
    return [out_MF.to(x_TD.dtype).view(*x_TD.shape[:-1], out_MF.shape[1]) for out_MF in outs]


def quantised(weight_RC: Tensor, format: Format) -> QTensor:
    """`packing.quantised` of finite numbers, with the same bytes."""
    assert format.name in PACKED, f"there is no kernel that writes {format.name}"
    rows, columns = weight_RC.shape
    data_RB = _room(rows, format.row_bytes(columns), dtype=torch.uint8)
    isa, threads = instruction_set(), torch.get_num_threads()
    step = max(1, STRETCH // max(1, columns))
    for row in range(0, rows, step):
        numbers_SC = weight_RC[row : row + step].to(torch.float32).contiguous()
        sizes.plain(numbers_SC)
        blocks = numbers_SC.numel() // format.block_weights
        library().pumice_pack(isa, format.id, numbers_SC.data_ptr(), blocks, data_RB[row:].data_ptr(), threads)
    return QTensor(data_RB, format)


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm` of float32."""
    sizes.norm(x_D, weight_D)
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
    sizes.plain(up)
    assert gate.shape == up.shape, f"{list(gate.shape)} is gated by {list(up.shape)}"
    return _gated(gate, up.contiguous(), 1.0)


def quick_gelu(x: Tensor) -> Tensor:
    """`reference.quick_gelu` of float32."""
    return _gated(x, None, 1.702)


def _gated(gate: Tensor, up: Tensor | None, slope: float) -> Tensor:
    sizes.plain(gate)
    gate = gate.contiguous()
    out = torch.empty_like(gate)
    isa, threads = instruction_set(), torch.get_num_threads()
    other = None if up is None else up.data_ptr()
    library().pumice_gated(isa, gate.data_ptr(), other, slope, gate.numel(), out.data_ptr(), threads)
    return out


def rotate(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """`reference.rotate` of float32."""
    sizes.rotation(x_BHTE, cos_BTE, sin_BTE)
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


def _pages(keys_NKSE: Tensor, values_NKSE: Tensor, table_RP: Tensor) -> CPages:
    sizes.alike("keys and values", keys_NKSE, values_NKSE)
    page_stride, head_stride, token_stride, step = keys_NKSE.stride()
    assert step == 1, f"the numbers of a key are {step} apart"
    assert keys_NKSE.is_cpu, f"keys are on {keys_NKSE.device}"
    assert keys_NKSE.dtype in KEY_TYPES, f"there is no kernel for keys of {keys_NKSE.dtype}"
    return CPages(
        keys_NKSE.data_ptr(),
        values_NKSE.data_ptr(),
        table_RP.data_ptr(),
        table_RP.shape[1],
        page_stride,
        keys_NKSE.shape[2],
        head_stride,
        token_stride,
        KEY_TYPES[keys_NKSE.dtype],
    )


def attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_BTS: Tensor | None, causal: bool = False) -> Tensor:
    """`reference.attention` of float32 queries over keys and values of any type in KEY_TYPES.

    Each row of keys is one page.
    """
    sizes.attention(q_BHTE, k_BKSE, v_BKSE, mask_BTS, causal)
    rows, _, tokens, _ = q_BHTE.shape
    positions = k_BKSE.shape[2]
    if k_BKSE.stride() != v_BKSE.stride() or k_BKSE.stride(3) != 1:
        k_BKSE, v_BKSE = (each.clone(memory_format=torch.contiguous_format) for each in (k_BKSE, v_BKSE))
    mask = None if mask_BTS is None else mask_BTS.expand(rows, tokens, positions).contiguous()
    places_BT = torch.arange(tokens, device="cpu").expand(rows, tokens).contiguous() if causal else None
    pages = _pages(k_BKSE, v_BKSE, table_R1 := torch.arange(rows, device="cpu")[:, None])
    return _attended(q_BHTE, pages, k_BKSE.shape[1], _Sight(positions, places_BT, mask), table_R1)


def attention_in_pages(q_BHTE: Tensor, pages: LayerPages, positions_BT: Tensor, window: int | None) -> Tensor:
    """`reference.attention_in_pages` of float32 queries over keys and values of any type in KEY_TYPES."""
    sizes.plain(q_BHTE)
    rows, heads, tokens, width = q_BHTE.shape
    kv_heads = pages.keys.shape[1]
    sizes.heads(heads, kv_heads, width)
    sizes.pages([pages.keys, pages.values], (kv_heads, width))
    table_RP, places_BT = pages.table_RP.contiguous(), positions_BT.expand(rows, tokens).contiguous()
    sizes.places(table_RP, places_BT, pages.keys)
    sight = _Sight(int(places_BT.max()) + 1, places_BT, None, window or 0)
    return _attended(q_BHTE, _pages(pages.keys, pages.values, table_RP), kv_heads, sight, table_RP)


@dataclass(frozen=True)
class _Sight:
    """Which positions queries see: those up to their own, or where a mask is True."""

    positions: int
    places_BT: Tensor | None
    mask_BTS: Tensor | None
    window: int = 0


def _attended(q_BHTE: Tensor, pages: CPages, kv_heads: int, sight: _Sight, held: Tensor) -> Tensor:
    """`held` is what the pages point to."""
    rows, heads, tokens, width = q_BHTE.shape
    if q_BHTE.stride(3) != 1:
        q_BHTE = q_BHTE.contiguous()
    out_BTHE = _room(rows, tokens, heads, width)
    described = CAttention(
        q_BHTE.data_ptr(),
        *q_BHTE.stride()[:3],
        pages,
        None if sight.places_BT is None else sight.places_BT.data_ptr(),
        None if sight.mask_BTS is None else sight.mask_BTS.data_ptr(),
        out_BTHE.data_ptr(),
        rows,
        tokens,
        heads,
        kv_heads,
        width,
        sight.positions,
        sight.window,
    )
    isa, threads, pointer = instruction_set(), torch.get_num_threads(), ctypes.byref(described)
    memory = _room(library().pumice_attention_floats(isa, pointer, threads))
    library().pumice_attention(isa, pointer, threads, memory.data_ptr())
    return out_BTHE.transpose(1, 2)


@dataclass(frozen=True)
class BlockWeights:
    """What a block of the language model multiplies with. matrices: q, k, v, o, gate, up, down. biases: of q, k and v.
    norms: before attention, before the MLP, float32."""

    matrices: Sequence[QTensor]
    biases: Sequence[Tensor | None]
    norms: Sequence[Tensor]


@dataclass(frozen=True)
class BlocksShape:
    """The numbers that all blocks share. window: how many positions a query sees, 0 for all."""

    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    window: int
    eps: float

    def matrices(self, width: int) -> list[tuple[int, int]]:
        """Rows and columns of q, k, v, o, gate, up and down."""
        inner, shared = self.heads * self.head_width, self.kv_heads * self.head_width
        mlp = [(self.ffn_width, width), (self.ffn_width, width), (width, self.ffn_width)]
        return [(inner, width), (shared, width), (shared, width), (width, inner), *mlp]


class Blocks:
    """All blocks of a language model, described once to the kernels; the weights are held and must stay as they are."""

    def __init__(self, blocks: Sequence[BlockWeights], shape: BlocksShape) -> None:
        sizes.heads(shape.heads, shape.kv_heads, shape.head_width)
        self.shape, self._width = shape, blocks[0].norms[0].shape[0]
        self._held: list[object] = []
        self._lock = threading.Lock()  # where keys and values lie is written into what is described
        self._blocks = (CBlock * len(blocks))(*(self._described(each) for each in blocks))

    def _described(self, block: BlockWeights) -> CBlock:
        matrices = [_whole(each) for each in block.matrices]
        biases = [*(_plain(each) for each in block.biases), None, None, None, None]
        norms = [each.detach().contiguous() for each in block.norms]
        sizes.block(matrices, self.shape.matrices(self._width), norms)
        for weight, bias in zip(matrices, biases, strict=True):
            sizes.product(weight.shape[1], weight, bias)
        self._held += [matrices, biases, norms]
        described = [_matrix(weight, bias, None) for weight, bias in zip(matrices, biases)]
        return CBlock(*described, *(each.data_ptr() for each in norms), None, None)

    def run(
        self,
        x_BTD: Tensor,
        turn: tuple[Tensor, Tensor],
        positions_BT: Tensor,
        pages: Pages,
        kept: int | None = None,
    ) -> Tensor:
        """The hidden states after the last block, (B, T, D) float32; new keys and values are put into the pages.

        turn: cosines and sines, (B, T, E). positions_BT: where each new position stands in its row, and how far back
        it sees: all positions before it, within the model's window. kept: of a single row, so many of the last
        positions are asked for, (1, kept, D); of the others the last block computes keys and values and no more.
        """
        sizes.passed(x_BTD, turn, self._width, self.shape.head_width)
        sizes.pages([*pages.keys, *pages.values], (self.shape.kv_heads, self.shape.head_width))
        rows, tokens, _ = x_BTD.shape
        first = 0 if kept is None else tokens - kept
        assert 0 <= first <= (tokens if rows == 1 else 0), f"{kept} of {tokens} positions of {rows} rows are asked for"
        places_BT = positions_BT.expand(rows, tokens)
        sizes.places(pages.table_RP, places_BT, pages.keys[0])
        turn_BTE = [each.expand(rows, tokens, -1) for each in turn]
        count = min(tokens, -(-rows * tokens // MOST_POSITIONS))
        ends = [tokens * part // count for part in range(count + 1)]
        outs = []
        with self._lock:
            for block, keys, values in zip(self._blocks, pages.keys, pages.values, strict=True):
                block.keys, block.values = keys.data_ptr(), values.data_ptr()
            for start, end in itertools.pairwise(ends):
                asked = min(end - start, max(0, end - first))
                turned = [each[:, start:end].contiguous() for each in turn_BTE]
                out_BTD = self._part(x_BTD[:, start:end], turned, places_BT[:, start:end].contiguous(), pages, asked)
                outs.append(out_BTD[:, end - start - asked :])
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _part(self, x_BTD: Tensor, turn_BTE: Sequence[Tensor], places_BT: Tensor, pages: Pages, kept: int) -> Tensor:
        x_BTD, table_RP = x_BTD.clone(memory_format=torch.contiguous_format), pages.table_RP.contiguous()
        rows, tokens, width = x_BTD.shape
        shape, isa, threads = self.shape, instruction_set(), torch.get_num_threads()
        described = ctypes.byref(
            CPass(
                x_BTD.data_ptr(),
                *(each.data_ptr() for each in turn_BTE),
                places_BT.data_ptr(),
                _pages(pages.keys[0], pages.values[0], table_RP),
                rows,
                tokens,
                kept,
                shape.heads,
                shape.kv_heads,
                shape.head_width,
                width,
                shape.ffn_width,
                shape.window,
                shape.eps,
            )
        )
        memory = _room(library().pumice_blocks_bytes(isa, described, threads), dtype=torch.uint8)
        library().pumice_blocks(isa, self._blocks, len(self._blocks), described, threads, memory.data_ptr())
        return x_BTD
