"""What does not fit is refused in words before the kernels see it; and what fits gives the same on several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pumice.ops import cpu
from pumice.ops.cpu import Blocks, BlocksShape, BlockWeights, Pages
from pumice.quant import FORMATS, QTensor
from test_cpu import instruction_set, matrix  # noqa: F401 (a fixture)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def ones(*shape: int) -> Tensor:
    return zeros(*shape) + 1


SHAPE = BlocksShape(heads=4, kv_heads=2, head_width=64, ffn_width=512, window=0, eps=1e-5)
SIZES = [(256, 256), (128, 256), (128, 256), (256, 256), (512, 256), (512, 256), (256, 512)]


def weights() -> BlockWeights:
    return BlockWeights([matrix("Q4_K", *size) for size in SIZES], [None] * 3, [ones(256)] * 2)


def run(
    x: Tensor | None = None, turn: Tensor | None = None, places: list[list[int]] | None = None, **pages: object
) -> Tensor:
    """A pass of two blocks over two rows, of three pages of four positions each; `pages` replaces its parts."""
    given = Pages(
        [zeros(6, 2, 4, 64) for _ in range(2)],
        [zeros(6, 2, 4, 64) for _ in range(2)],
        torch.tensor([[4, 0, 1], [2, 5, 3]]),
    )
    x = zeros(2, 1, 256) if x is None else x
    turn = ones(2, 1, 64) if turn is None else turn
    places_BT = torch.tensor([[11], [0]] if places is None else places, dtype=torch.int64)
    return Blocks([weights()] * 2, SHAPE).run(x, (turn, turn), places_BT, replace(given, **pages))


def attend(*, mask: Tensor | None = None, **parts: Tensor) -> Tensor:
    given = {"q": zeros(2, 4, 3, 16), "k": zeros(2, 2, 9, 16), "v": zeros(2, 2, 9, 16)} | parts
    return cpu.attention(given["q"], given["k"], given["v"], mask)


Q4_0 = FORMATS["Q4_0"]
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "bytes that are no whole block": (
        lambda: QTensor(zeros(4, 35, dtype=torch.uint8), Q4_0),
        "35 bytes in blocks of 18",
    ),
    "numbers for bytes": (lambda: QTensor(zeros(4, 36), Q4_0), "no rows of bytes"),
    "one row of bytes": (lambda: QTensor(zeros(36, dtype=torch.uint8), Q4_0), "1 dimensions"),
    "too few channels": (lambda: cpu.linears(zeros(3, 32), [matrix("Q4_0", 8, 64)], [None]), "32 channels meet"),
    "too many channels": (lambda: cpu.linears(zeros(3, 96), [matrix("Q4_0", 8, 64)], [None]), "of 64 columns"),
    "a second matrix": (
        lambda: cpu.linears(zeros(3, 64), [matrix("Q4_0", 8, 64), matrix("Q8_0", 8, 32)], [None, None]),
        "64 channels meet a matrix of 32",
    ),
    "a short bias": (lambda: cpu.linears(zeros(3, 64), [matrix("Q4_0", 8, 64)], [zeros(7)]), "beside 8 rows"),
    "a bias in two axes": (lambda: cpu.linears(zeros(3, 64), [matrix("Q4_0", 8, 64)], [zeros(1, 8)]), "beside 8 rows"),
    "a matrix elsewhere": (
        lambda: cpu.linears(zeros(3, 64), [matrix("Q4_0", 8, 64).to(torch.device("meta"), torch.float32)], [None]),
        "is on meta",
    ),
    "no kernel": (lambda: cpu.linears(zeros(3, 8), [QTensor(zeros(2, 32).byte(), FORMATS["F32"])], [None]), "F32"),
    "a short norm": (lambda: cpu.rms_norm(zeros(3, 64), zeros(63), 1e-5), "63 weights for a width of 64"),
    "a norm in two axes": (lambda: cpu.rms_norm(zeros(3, 64), zeros(3, 64), 1e-5), "192 weights"),
    "a narrow norm": (lambda: cpu.rms_norm(zeros(3, 64), zeros(64).half(), 1e-5), "float16"),
    "a narrow input": (lambda: cpu.rms_norm(zeros(3, 64).bfloat16(), zeros(64), 1e-5), "bfloat16"),
    "half a gate": (lambda: cpu.gated_mlp(zeros(4, 64), zeros(1, 64)), r"\[4, 64\] is gated by \[1, 64\]"),
    "a wide gate": (lambda: cpu.gated_mlp(zeros(4, 64).double(), zeros(4, 64)), "float64"),
    "narrow activations": (lambda: cpu.quick_gelu(zeros(4, 64).half()), "float16"),
    "an odd head": (lambda: cpu.rotate(zeros(1, 2, 3, 7), zeros(1, 3, 7), zeros(1, 3, 7)), "7 are odd"),
    "narrow angles": (lambda: cpu.rotate(zeros(1, 2, 3, 8), zeros(1, 3, 8).half(), zeros(1, 3, 8)), "float16"),
    "wide queries": (lambda: attend(q=zeros(2, 4, 3, 16).double()), "float64"),
    "other keys": (lambda: attend(k=zeros(2, 2, 8, 16)), "keys and values differ"),
    "keys of another type": (lambda: attend(k=zeros(2, 2, 9, 16).half()), "keys and values differ"),
    "keys and values of a wide type": (
        lambda: attend(k=zeros(2, 2, 9, 16).double(), v=zeros(2, 2, 9, 16).double()),
        "no kernel for keys of torch.float64",
    ),
    "keys elsewhere": (
        lambda: attend(k=zeros(2, 2, 9, 16).to("meta"), v=zeros(2, 2, 9, 16).to("meta")),
        "keys are on meta",
    ),
    "fewer rows of keys": (lambda: attend(k=zeros(1, 2, 9, 16), v=zeros(1, 2, 9, 16)), r"keys \[1, 2, 9, 16\]"),
    "more queries than keys that follow each other": (
        lambda: cpu.attention(zeros(2, 4, 3, 16), zeros(2, 2, 2, 16), zeros(2, 2, 2, 16), None, True),
        "last of 3 queries sees 3 of 2 keys",
    ),
    "narrower keys": (lambda: attend(k=zeros(2, 2, 9, 8), v=zeros(2, 2, 9, 8)), r"keys \[2, 2, 9, 8\]"),
    "heads that do not share": (lambda: attend(k=zeros(2, 3, 9, 16), v=zeros(2, 3, 9, 16)), "4 heads share 3"),
    "heads of odd width": (
        lambda: attend(q=zeros(2, 4, 3, 12), k=zeros(2, 2, 9, 12), v=zeros(2, 2, 9, 12)),
        "not a multiple of 8",
    ),
    "a mask of numbers": (lambda: attend(mask=zeros(2, 3, 9)), "mask is of torch.bool"),
    "a page beyond the last": (lambda: run(table_RP=torch.tensor([[4, 0, 1], [2, 6, 3]])), "pages 0 to 6 of 6"),
    "a page before the first": (lambda: run(table_RP=torch.tensor([[4, 0, 1], [2, -1, 3]])), "pages -1 to 4 of 6"),
    "a table of 32 bits": (lambda: run(table_RP=torch.tensor([[4], [2]]).int()), "pages are of torch.int32"),
    "a table of one row": (lambda: run(table_RP=torch.tensor([[4, 0, 1]])), "1 rows of pages for 2"),
    "a table of nothing": (lambda: run(table_RP=zeros(2, 0).long()), "there are no pages"),
    "a position beyond the pages": (lambda: run(places=[[12], [0]]), "positions 0 to 12 of 12"),
    "a position before the first": (lambda: run(places=[[3], [-1]]), "positions -1 to 3 of 12"),
    "no positions": (lambda: run(x=zeros(2, 0, 256), turn=zeros(2, 0, 64), places=[[], []]), "there are no positions"),
    "keys of another layer": (lambda: run(keys=[zeros(6, 2, 4, 64), zeros(5, 2, 4, 64)]), "keys and values differ"),
    "keys in another layout": (
        lambda: run(keys=[zeros(6, 2, 4, 64), zeros(6, 4, 2, 64).transpose(1, 2)]),
        "differ in their layout",
    ),
    "keys of too few heads": (lambda: run(keys=[zeros(6, 1, 4, 64)] * 2, values=[zeros(6, 1, 4, 64)] * 2), "1 heads"),
    "hidden states of another width": (lambda: run(x=zeros(2, 1, 128)), r"\(128, 64, 64\) wide"),
    "narrow hidden states": (lambda: run(x=zeros(2, 1, 256).half()), "float16"),
    "angles of another width": (lambda: run(turn=zeros(2, 1, 32)), r"\(256, 32, 32\) wide"),
    "a matrix of another shape": (
        lambda: Blocks([replace(weights(), matrices=[matrix("Q4_K", 256, 256)] * 7)], SHAPE),
        "the matrices of a block are",
    ),
    "a norm of another width": (
        lambda: Blocks([weights(), replace(weights(), norms=[ones(256), ones(255)])], SHAPE),
        "not of width 256",
    ),
    "a bias of a block": (lambda: Blocks([replace(weights(), biases=[None, zeros(256), None])], SHAPE), "beside 128"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(what: str) -> None:
    call, words = WRONG[what]
    with pytest.raises(AssertionError, match=words):
        call()


def test_what_pytorch_refuses() -> None:
    """Shapes that do not spread to others."""
    for call in (
        lambda: cpu.rotate(zeros(1, 2, 3, 8), zeros(1, 4, 8), zeros(1, 4, 8)),
        lambda: attend(mask=torch.ones(2, 3, 8, dtype=torch.bool)),
        lambda: run(places=[[0], [0], [0]]),
    ):
        with pytest.raises(RuntimeError, match=r"expanded size|must match"):
            call()


def test_what_fits() -> None:
    """The same calls with nothing wrong, and with nothing in them."""
    assert run().shape == (2, 1, 256)
    assert attend().shape == (2, 4, 3, 16)
    assert attend(q=zeros(2, 4, 0, 16)).shape == (2, 4, 0, 16)
    assert attend(k=zeros(2, 2, 0, 16), v=zeros(2, 2, 0, 16)).eq(0).all()
    assert attend(q=zeros(0, 4, 3, 16), k=zeros(0, 2, 9, 16), v=zeros(0, 2, 9, 16)).shape == (0, 4, 3, 16)
    assert cpu.rms_norm(zeros(0, 64), zeros(64), 1e-5).shape == (0, 64)
    assert cpu.gated_mlp(zeros(0, 64), zeros(0, 64)).shape == (0, 64)
    assert cpu.rotate(zeros(1, 2, 0, 8), zeros(1, 0, 8), zeros(1, 0, 8)).shape == (1, 2, 0, 8)
    nothing = QTensor(zeros(0, 36, dtype=torch.uint8), Q4_0)
    assert cpu.linears(zeros(3, 64), [nothing], [None])[0].shape == (3, 0)


@pytest.fixture
def other_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float16)
    yield
    torch.set_default_dtype(torch.float32)


def test_pytorchs_default_type_is_not_the_kernels(other_default: None) -> None:
    """Results are in float32, and memory for them too."""
    x = torch.ones(9, 64, dtype=torch.float32)
    assert cpu.linears(x, [matrix("Q4_0", 512, 64)], [None])[0].dtype == torch.float32
    assert attend().dtype == torch.float32
    assert run().dtype == torch.float32


def results() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(40, 512, generator=draw)
    formats = ("Q4_0", "Q8_0", "Q4_K", "Q6_K")
    found = [
        each for m in (1, 5, 40) for each in cpu.linears(x[:m], [matrix(f, 200, 512) for f in formats], [None] * 4)
    ]
    q, k, v = (torch.randn(2, heads, 300, 64, generator=draw) for heads in (8, 4, 4))
    found += [cpu.attention(q[:, :, :5], k, v, None), cpu.rotate(q, q[:, 0], q[:, 1])]
    found += [cpu.rms_norm(x, x[0], 1e-5), cpu.quick_gelu(torch.randn(90000, generator=draw))]
    found += [cpu.quantised(x, FORMATS[name]).data_RB for name in formats]
    return [*found, run(x[:2, None, :256].contiguous())]


@pytest.mark.usefixtures("instruction_set")
def test_threads_share_work_and_nothing_else() -> None:
    """Each number is the work of one thread: how many there are changes no bit."""
    alone = results()
    torch.set_num_threads(3)
    try:
        together = results()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in zip(alone, together))
