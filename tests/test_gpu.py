"""Triton's kernels agree with the definitions: on a GPU where there is one, else by Triton's interpreter on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pumice import ops, packing
from pumice.ops import reference
from pumice.ops.pages import LayerPages
from pumice.quant import FORMATS, QTensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
InterpreterError = pytest.importorskip("triton.runtime.errors").InterpreterError

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCKS = [name for name, each in FORMATS.items() if each.dtype is None]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HERE.type == "cuda" else [])]
"""The interpreter multiplies matrices of bfloat16 as if their bits were whole numbers."""
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
"""Where a block has its numbers of half precision, if not at its start."""
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@triton.jit
def counted(out_ptr, count):  # type: ignore[no-untyped-def]
    """A loop to a number that is given, which Triton 3.6 does not interpret with NumPy 2.4."""
    for step in range(count):
        tl.store(out_ptr + step, step)


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The kernels, for the GPU or for the interpreter, which is chosen before triton is imported."""
    if HERE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton was imported for a GPU before this test")
    from pumice.ops import gpu

    if HERE.type == "cpu":
        try:
            counted[(1,)](out := torch.zeros(3), 3)
        except InterpreterError as error:
            pytest.skip(f"this Triton's interpreter does not run with this NumPy: {error}")
        assert out.tolist() == [0, 1, 2]
    return gpu


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(HERE)


def in_blocks(name: str, rows: int, blocks: int, dtype: torch.dtype, head_width: int = 0) -> QTensor:
    """Random bytes with scales of a common size: each bit of each field is used."""
    format = FORMATS[name]
    bytes_ = torch.randint(0, 256, (rows * blocks, format.block_bytes), generator=torch.Generator().manual_seed(5))
    data = bytes_.to(torch.uint8)
    halves = {
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q6_K": (208,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q4_1": (0, 2),
        "Q5_1": (0, 2),
    }
    for at in halves.get(name, (0,)):
        scale = (torch.rand(len(data), 1, generator=torch.Generator().manual_seed(at)) - 0.5) / 16
        data[:, at : at + 2] = scale.to(torch.float16).view(torch.uint8)
    return QTensor(data.view(rows, -1).to(HERE), format, dtype, head_width)


def close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of a type, relative to the largest number."""
    assert got.dtype == dtype
    assert_close(got.double(), exact, atol=ROUNDING[dtype] * float(exact.abs().max()), rtol=0)


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_every_format_unpacks_to_the_bit(gpu: ModuleType, name: str) -> None:
    weight = in_blocks(name, 6, 3 if FORMATS[name].block_weights == 32 else 1, torch.float32)
    assert torch.equal(gpu.dense(weight, torch.float32), weight.dense())
    ids = torch.tensor([[5, 0], [2, 5]], device=HERE)
    assert torch.equal(gpu.embed(ids, weight), weight.rows(ids))


def test_rows_of_heads_come_in_transformers_order(gpu: ModuleType) -> None:
    weight = in_blocks("Q4_0", 16, 1, torch.float32, head_width=8)
    assert torch.equal(gpu.dense(weight, torch.float32), weight.dense())
    for inputs in (1, 3):
        x = drawn(inputs, 32)
        close(gpu.linear(x, weight, None), reference.linear(x.double(), weight.dense().double(), None), torch.float32)


@pytest.mark.parametrize("inputs", [1, 5, 70])
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_product(gpu: ModuleType, name: str, inputs: int) -> None:
    """One input, few, and so many that the matrix is unpacked; rows that fill no tile, units that fill no pass."""
    for dtype in DTYPES:
        weight = in_blocks(name, 37, 9 if FORMATS[name].block_weights == 32 else 1, dtype)
        x, bias = drawn(inputs, weight.shape[1]).to(dtype), drawn(37, seed=2).to(dtype)
        exact = reference.linear(x.double(), weight.dense(torch.float32).double(), bias.double())
        close(gpu.linear(x, weight, bias), exact, dtype)


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("Q4_0", "Q8_0", "Q4_K", "Q6_K")])
def test_product_of_the_other_formats(gpu: ModuleType, name: str) -> None:
    weight = in_blocks(name, 9, 2 if FORMATS[name].block_weights == 32 else 1, torch.float32)
    for inputs in (1, 2):
        x = drawn(inputs, weight.shape[1])
        close(gpu.linear(x, weight, None), reference.linear(x.double(), weight.dense().double(), None), torch.float32)


def test_leading_shapes_and_no_input(gpu: ModuleType) -> None:
    weight = in_blocks("Q8_0", 5, 1, torch.float32)
    x = drawn(2, 3, 32)
    assert_close(gpu.linear(x, weight, None), reference.linear(x, weight.dense(), None))
    assert gpu.linear(x[:0], weight, None).shape == (0, 3, 5)
    assert gpu.embed(torch.zeros(0, dtype=torch.int64, device=HERE), weight).shape == (0, 32)


# --- attention --------------------------------------------------------------------------------------------------------


def kept(rows: int, heads: int, width: int, reach: Tensor, dtype: torch.dtype) -> LayerPages:
    """Pages of 4 positions in any order; what no query sees is no number."""
    pages = int(reach.max()) // 4 + 1
    table = torch.randperm(rows * pages + 1, generator=torch.Generator().manual_seed(1))[: rows * pages].view(
        rows, pages
    )
    keys = torch.full((rows * pages + 1, heads, 4, width), float("nan"))
    values = keys.clone()
    for row in range(rows):
        for place in range(int(reach[row]) + 1):
            for seed, each in ((place, keys), (place + 1000, values)):
                each[table[row, place // 4], :, place % 4] = drawn(heads, width, seed=seed * 10 + row).cpu()
    return LayerPages(keys.to(HERE, dtype), values.to(HERE, dtype), table.to(HERE))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "tokens", "window", "parts"),
    [
        (4, 4, 16, 1, None, 1),
        (4, 2, 24, 1, None, 3),  # heads of a width that is no power of two, as Phi-3's; keys in parts
        (8, 2, 16, 1, 3, 2),  # a window, which leaves a part without keys
        (4, 2, 16, 3, None, 1),
        (4, 1, 16, 9, 5, 4),  # more queries than one program takes
    ],
)
def test_attention_in_pages(
    gpu: ModuleType, heads: int, kv_heads: int, width: int, tokens: int, window: int | None, parts: int
) -> None:
    reach = torch.tensor([tokens - 1, 13, 18])
    positions = (reach[:, None] - tokens + 1 + torch.arange(tokens)).to(HERE)
    for dtype in DTYPES:
        pages = kept(3, kv_heads, width, reach, dtype)
        q = drawn(3, tokens, heads, width).to(dtype).transpose(1, 2)
        got = gpu.attention_in_pages(q, pages, positions, window, parts)
        assert got.shape == q.shape
        close(got, reference.attention_in_pages(q.double(), pages, positions, window), dtype)


def test_keys_of_a_narrower_type_and_positions_that_rows_share(gpu: ModuleType) -> None:
    pages = kept(2, 2, 16, torch.tensor([6, 6]), torch.float16)
    q, positions = drawn(2, 4, 1, 16), torch.tensor([[6]], device=HERE)
    got = gpu.attention_in_pages(q, pages, positions, None, 2)
    close(got, reference.attention_in_pages(q.double(), pages, positions.expand(2, 1), None), torch.float32)


def test_parts_fill_the_device_and_are_not_too_short(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_multiprocessors", lambda device: 108)
    assert gpu._parts(HERE, 32, 4096) == 7
    assert gpu._parts(HERE, 32, 512) == 2
    assert gpu._parts(HERE, 32, 32) == 1
    assert gpu._parts(HERE, 2048, 4096) == 1


# --- who is called ----------------------------------------------------------------------------------------------------


@pytest.fixture
def everywhere(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels for each tensor, as on a GPU."""
    monkeypatch.setattr(ops, "_by_kernels", lambda x: False)
    monkeypatch.setattr(ops, "_by_triton", lambda x: None if x.requires_grad and torch.is_grad_enabled() else gpu)


def test_operations_go_to_the_kernels(everywhere: None, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("linear", "embed", "attention_in_pages"):
        real = vars(gpu)[name]
        monkeypatch.setattr(gpu, name, lambda *args, name=name, real=real: (called.append(name), real(*args))[1])
    weight = packing.quantised(drawn(32, 32).cpu(), FORMATS["Q8_0"])
    weight = weight.to(HERE, torch.float32)
    x, ids = drawn(2, 32), torch.tensor([3, 1], device=HERE)
    assert_close(ops.linears(x, [weight], [None])[0], reference.linear(x, weight.dense(), None))
    assert torch.equal(ops.embed(ids, weight), weight.rows(ids))
    pages, positions = kept(2, 2, 16, torch.tensor([4, 6]), torch.float32), torch.tensor([[4], [6]], device=HERE)
    q, k, v = drawn(2, 4, 1, 16), drawn(2, 2, 1, 16, seed=1), drawn(2, 2, 1, 16, seed=2)
    got = ops.attention_in_pages(q, k, v, pages, positions, None)
    assert_close(got, reference.attention_in_pages(q, pages, positions, None))
    assert called == ["linear", "embed", "attention_in_pages"]
    learning = drawn(2, 32).requires_grad_()
    ops.linear(learning, weight, None).sum().backward()
    assert len(called) == 3
    assert learning.grad is not None


def test_a_cpu_does_not_import_triton() -> None:
    multiply = "pumice.ops.linear(torch.ones(1, 4), torch.ones(4, 4), None)"
    code = f"import sys, torch, pumice.ops; {multiply}; print('triton' in sys.modules)"
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=plain)
    assert done.stdout.strip() == "False"


# --- compiled ---------------------------------------------------------------------------------------------------------


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """To machine code, without a GPU: what the interpreter takes and the compiler does not is found here. Shared memory
    stays under the 99 KB of the smallest of these GPUs (CUDA C++ Programming Guide, compute capabilities)."""
    command = [sys.executable, Path(__file__).with_name("compiled.py"), "80", "--few"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["kernel"] for each in lines} == {"attend", "join", "row_product", "product", "unpack"}
    assert {each["format"] for each in lines} == {None, "Q4_0", "Q6_K"}
    assert max(each["shared_bytes"] for each in lines) <= 99 * 1024
