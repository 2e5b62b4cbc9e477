"""The kernels that write blocks: the bytes of `packing` on every instruction set that this CPU has, and ggml's own."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pumice import ops, packing
from pumice.ops import cpu, library
from pumice.quant import FORMATS
from test_cpu import instruction_set  # noqa: F401 (a fixture)
from test_kquants import blocks
from test_quant import HASHES, ROW, TRIALS, numbers, trials

EVERYWHERE = pytest.mark.usefixtures("instruction_set")


@functools.cache
def kinds() -> Tensor:
    """Rows of 512: noise of every size, from denormal numbers to the largest, whose sums overflow; sizes mixed within
    groups and between them; ties, constants, zeros of both signs, outliers."""
    draw = torch.Generator().manual_seed(7)
    noise = torch.randn(400, 512, generator=draw) * torch.logspace(-44, 38, 400, dtype=torch.float64)[:, None]
    apart = torch.randn(200, 512, generator=draw) * 10.0 ** torch.randint(-38, 37, (200, 512), generator=draw)
    groups = torch.randn(200, 512, generator=draw) * (
        10.0 ** torch.randint(-30, 30, (200, 32), generator=draw)
    ).repeat_interleave(16, dim=1)
    few = torch.randint(-3, 4, (100, 512), generator=draw) * 2.0 ** torch.randint(-149, 126, (100, 1), generator=draw)
    flat = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-15, -9e-16, 65504.0, 1e25, -1e25, 3e38])[:, None]
    signs = torch.where(torch.rand(20, 512, generator=draw) < 0.5, 0.0, -0.0)
    outliers = torch.randn(100, 512, generator=draw) * 0.02
    outliers[:, 77::131] *= 1e5
    x = [noise, apart, groups, few, flat.expand(-1, 512), signs, outliers, trials().float().view(-1, 512)]
    x += [numbers().view(-1, 512), torch.from_numpy(blocks()).view(-1, 512)]
    return torch.cat([each.double().clamp(-3.4e38, 3.4e38).float() for each in x])


@functools.cache
def plain(name: str) -> Tensor:
    return packing.quantised(kinds(), FORMATS[name]).data_RB


@EVERYWHERE
@pytest.mark.parametrize("name", HASHES)
def test_the_bytes_of_the_definition(name: str) -> None:
    assert kinds().isfinite().all()
    found = cpu.quantised(kinds(), FORMATS[name]).data_RB
    assert not (found != plain(name)).any(1).nonzero().flatten().tolist()


@EVERYWHERE
@pytest.mark.parametrize("name", HASHES)
def test_the_bytes_of_ggml(name: str) -> None:
    for x, expected in ((ROW[None], HASHES), (trials(), TRIALS)):
        packed = cpu.quantised(x, FORMATS[name]).data_RB
        assert hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16] == expected[name]


@EVERYWHERE
@pytest.mark.parametrize("name", HASHES)
def test_what_is_no_number_spoils_its_own_block_alone(name: str) -> None:
    """Files never hold such a block (`recoded` refuses it); the kernels must live through it."""
    format = FORMATS[name]
    x = torch.randn(9, 768, generator=torch.Generator().manual_seed(8))
    spoilt = x.clone()
    for row, bad in enumerate((float("inf"), float("-inf"), float("nan"))):
        spoilt[3 * row, 300], spoilt[3 * row + 1, 256:512], spoilt[3 * row + 2, 256:512:3] = bad, bad, bad
    blocks = [cpu.quantised(each, format).data_RB.view(9, -1, format.block_bytes) for each in (x, spoilt)]
    first, behind = 256 // format.block_weights, 512 // format.block_weights
    assert torch.equal(blocks[0][:, :first], blocks[1][:, :first])
    assert torch.equal(blocks[0][:, behind:], blocks[1][:, behind:])


def test_rows_of_any_type_and_layout() -> None:
    x = torch.randn(512, 6, generator=torch.Generator().manual_seed(9))
    for given in (x.T, x.T.bfloat16(), x.T[::2]):
        found, expected = (each(given, FORMATS["Q4_K"]) for each in (cpu.quantised, packing.quantised))
        assert found.shape == expected.shape == given.shape
        assert torch.equal(found.data_RB, expected.data_RB)
    for empty in (x.T[:0], x.T[:, :0]):
        assert cpu.quantised(empty, FORMATS["Q4_K"]).shape == empty.shape


def test_what_the_kernels_cannot_write() -> None:
    with pytest.raises(AssertionError, match="no kernel that writes IQ4_NL"):
        cpu.quantised(torch.zeros(1, 32), FORMATS["IQ4_NL"])
    with pytest.raises(AssertionError, match="33 columns in blocks of 32"):
        cpu.quantised(torch.zeros(32, 33), FORMATS["Q4_0"])


@pytest.mark.parametrize(
    ("of", "name", "value"), [(ops, "_backend", lambda: ops.reference), (library, "built", lambda: None)]
)
def test_the_definition_where_the_kernels_are_not_wanted_or_not_built(
    of: object, name: str, value: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(cpu, "quantised", lambda *given: called.append(given))
    ops.quantised(ROW[None], FORMATS["Q4_K"])
    assert len(called) == 1
    monkeypatch.setattr(of, name, value)
    packed = ops.quantised(ROW[None], FORMATS["Q4_K"])
    assert hashlib.sha256(packed.data_RB.numpy().tobytes()).hexdigest()[:16] == HASHES["Q4_K"]
    assert len(called) == 1
