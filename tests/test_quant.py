"""Block formats: against the gguf package, and against hashes of what llama.cpp's own quantiser wrote."""

from __future__ import annotations

import hashlib
import math

import gguf
import numpy as np
import pytest
import torch

from pumice import ops, packing, quant
from pumice.quant import FORMATS, QTensor

ROW = torch.tensor([((37 * i + 11) % 101 - 50) * (4 + i // 32) / 256 for i in range(256)])
HASHES = {
    "Q4_0": "313ac008cb598919", "Q4_1": "73b1849b983abc17", "Q5_0": "ee0f17383d7661a1", "Q5_1": "f7428d6d9a134169",
    "Q8_0": "bc8f0fe3acd6965f", "Q2_K": "b15d9b72db7158d5", "Q3_K": "50010c81afdeadc6", "Q4_K": "e61d295ff58bc137",
    "Q5_K": "b24478960dcf161b", "Q6_K": "f9cc219c490ee674",
}  # fmt: skip
"""First half of the SHA-256 of the row above as llama-quantize (b11434) writes it."""
TRIALS = {
    "Q4_0": "ffbc3dde8f0be49c", "Q4_1": "df4ab6cf75264754", "Q5_0": "ab6cb3785fbb3d0b", "Q5_1": "37d47e5d0166f6dc",
    "Q8_0": "19bc6d73402450c9", "Q2_K": "071b3ba75811c956", "Q3_K": "8c0a0a1186b69f89", "Q4_K": "ad57346fb89cccc3",
    "Q5_K": "e83e2315c924f418", "Q6_K": "39e15af27c464ea4",
}  # fmt: skip
"""The same of the super-blocks that `trials` makes, from ggml's ggml_quantize_chunk (ggml 0.26.0, x86-64)."""
PACKED = [name for name, each in FORMATS.items() if name != "IQ4_NL"]
BY_PACKAGE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32"]


def numbers(rows: int = 600) -> torch.Tensor:
    """Rows over ten decades, with zeros, equal values, one sign, ties of both signs, and halves that must round."""
    torch.manual_seed(0)
    x = torch.randn(rows, 256) * torch.logspace(-6, 4, rows)[:, None]
    x[5], x[6], x[7], x[8], x[9] = 0, 3.25, x[7].abs(), -x[8].abs(), torch.tensor([1.0, -1.0] * 128)
    x[10] = torch.arange(256) / 2 - 64
    x[11, 32:] = 0
    x[12] = torch.randint(-8, 8, (256,)) * 0.5
    return x


@pytest.mark.parametrize("name", HASHES)
def test_the_bytes_of_llama_quantize(name: str) -> None:
    packed = packing.quantised(ROW[None], FORMATS[name])
    assert hashlib.sha256(packed.data_RB.numpy().tobytes()).hexdigest()[:16] == HASHES[name]


def trials(rows: int = 64) -> torch.Tensor:
    """Super-blocks of eight kinds, `rows` of each, made of whole numbers alone so that they are the same everywhere."""
    place = torch.arange(rows * 256)
    mixed = place * 2654435761 % 2**32
    mixed = (mixed ^ mixed >> 15) * 2246822519 % 2**32
    mixed = (mixed ^ mixed >> 13).view(rows, 256)
    noise = (sum((mixed >> shift) & 255 for shift in (0, 8, 16, 24)) - 510) / 4096
    row = torch.arange(rows)[:, None]
    group = torch.arange(256) // 16
    signs = torch.where(mixed % 2 == 0, 1.0, -1.0)
    kinds = {
        "noise": noise,
        "far from zero": noise / 16 + ((row * 37) % 101 - 50) / 64,
        "outliers": noise * torch.where(mixed % 97 == 0, 64, 1),
        "steps": noise[:, ::16].repeat_interleave(16, dim=1),
        "zeros among": noise * (mixed % 3 == 0) * ((row + group) % 4 != 0),
        "one magnitude": signs * (row + 1) / 64,
        "groups far apart": noise * 2.0 ** ((row * 7 + group * 5) % 40 - 25),
        "zeros of both signs": signs * 0.0 * (row > 0) - 0.0 * (row == 1),
    }
    return torch.cat([each.float() for each in kinds.values()])


@pytest.mark.parametrize("name", TRIALS)
def test_the_bytes_of_ggml_for_all_kinds_of_blocks(name: str) -> None:
    packed = packing.quantised(trials(), FORMATS[name])
    assert hashlib.sha256(packed.data_RB.numpy().tobytes()).hexdigest()[:16] == TRIALS[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Q4_0", "0080" + "88" * 16), ("Q5_0", "0080" + "ff" * 4 + "00" * 16), ("Q8_0", "00" * 34), ("Q4_K", "00" * 144),
     ("Q2_K", "00" * 84), ("Q5_K", "00" * 176), ("Q6_K", "00" * 210)],
)  # fmt: skip
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_of_either_sign(name: str, expected: str, zero: float) -> None:
    format = FORMATS[name]
    assert packing.pack(torch.full((1, format.block_weights), zero), format).numpy().tobytes().hex() == expected


@pytest.mark.parametrize("name", FORMATS)
def test_any_bytes_unpack_as_the_package_unpacks_them(name: str) -> None:
    format = FORMATS[name]
    raw = torch.randint(
        0, 256, (700, format.block_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name])
    found = quant.unpack(raw, format).numpy()
    assert np.array_equal(found, expected.reshape(found.shape), equal_nan=True)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (format.block_weights, format.block_bytes) == (block, size)
    assert format.id == gguf.GGMLQuantizationType[name]


@pytest.mark.parametrize("name", BY_PACKAGE)
def test_numbers_pack_as_the_package_packs_them(name: str) -> None:
    x = numbers()
    expected = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(len(x), -1)
    assert np.array_equal(packing.quantised(x, FORMATS[name]).data_RB.numpy(), expected)


@pytest.mark.parametrize(
    ("name", "error"), [("Q2_K", 0.4), ("Q3_K", 0.2), ("Q4_K", 0.1), ("Q5_K", 0.05), ("Q6_K", 0.025)]
)
def test_k_quants_stay_near(name: str, error: float) -> None:
    """Relative error of a row, from noise over ten decades down to rows without a spread; zeros stay zeros."""
    x = numbers()
    back = packing.quantised(x, FORMATS[name]).dense()
    assert torch.isfinite(back).all()
    assert not back[5].any()
    wide = x.norm(dim=1) > 2  # below, half-precision scales lose bits
    assert float(((back - x).norm(dim=1) / x.norm(dim=1))[wide].max()) < error


@pytest.mark.parametrize("name", PACKED)
def test_a_matrix_in_blocks(name: str, unrounded: None) -> None:
    """Shape, bytes, single rows, and a product that is the product with the unpacked matrix."""
    torch.manual_seed(3)
    format = FORMATS[name]
    blocks = packing.quantised(torch.randn(12, 512), format)
    assert blocks.shape == (12, 512)
    assert blocks.nbytes == 12 * 512 // format.block_weights * format.block_bytes
    dense = blocks.dense()
    assert torch.equal(blocks.rows(torch.tensor([[3, 0], [11, 3]])), dense[torch.tensor([[3, 0], [11, 3]])])
    assert torch.equal(ops.embed(torch.tensor([2]), blocks), dense[2:3])
    x_TD = torch.randn(5, 512)
    assert torch.equal(ops.linear(x_TD, blocks, None), ops.linear(x_TD, dense, None))
    narrow = blocks.to(torch.device("cpu"), torch.bfloat16)
    assert torch.equal(narrow.dense(), dense.to(torch.bfloat16))


def test_columns_come_in_whole_blocks() -> None:
    with pytest.raises(AssertionError, match="columns in blocks of 32"):
        FORMATS["Q4_0"].row_bytes(33)


def test_a_quantised_tensor_takes_its_bits() -> None:
    bits = {name: 8 * each.block_bytes / each.block_weights for name, each in FORMATS.items()}
    assert math.isclose(bits["Q4_K"], 4.5)
    assert math.isclose(bits["Q6_K"], 6.5625)
    assert QTensor(torch.zeros(2, 36, dtype=torch.uint8), FORMATS["Q4_0"]).shape == (2, 64)
