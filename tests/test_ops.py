"""The fast form of each operation is the plain one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from pumice.config import Rotary
from pumice.ops import fused, reference


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["causal", "mask", "all"])
def test_attention(kv_heads: int, kind: str) -> None:
    queries = 7 if kind == "causal" else 3
    q, k, v = drawn(2, 4, queries, 8), drawn(2, kv_heads, 7, 8, seed=1), drawn(2, kv_heads, 7, 8, seed=2)
    mask = drawn(2, queries, 7, seed=3) > 0
    mask[..., 0] = True
    chosen = mask if kind == "mask" else None
    assert_close(
        fused.attention(q, k, v, chosen, kind == "causal"), reference.attention(q, k, v, chosen, kind == "causal")
    )


def test_attention_by_hand() -> None:
    """Two keys, one of which is forbidden: the result is the other's value."""
    q, k, v = torch.ones(1, 1, 1, 2), drawn(1, 1, 2, 2), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    mask = torch.tensor([[[False, True]]])
    assert reference.attention(q, k, v, mask, False).flatten().tolist() == [3.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, fused.WIDEN_ROWS + 1])
def test_linear(dtype: torch.dtype, rows: int) -> None:
    """Widened or not, the product is that of the rounded weights, within the type's own rounding of the result."""
    x, weight, bias = drawn(rows, 64).to(dtype), drawn(48, 64, seed=1).to(dtype), drawn(48, seed=2).to(dtype)
    exact = reference.linear(x.double(), weight.double(), bias.double())
    steps = 4 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert_close(fused.linear(x, weight, bias).double(), exact, atol=steps, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_asks_for_whole_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of rows would be compiled anew, and kept: of a hundred lengths of prompts few reach the product."""
    asked = set()
    product = F.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        asked.add(x.shape[:-1].numel())
        return product(x, weight, bias)

    weight, bias = drawn(48, 64, seed=1).to(dtype), drawn(48, seed=2).to(dtype)
    monkeypatch.setattr(fused, "_has_native_16bit", lambda dtype: True)
    monkeypatch.setattr(F, "linear", watched)
    for rows in range(101):
        x = drawn(2, rows, 64).to(dtype)
        exact = reference.linear(x.double(), weight.double(), bias.double())
        steps = 4 * torch.finfo(dtype).eps * float(exact.abs().max()) if rows else 0.0
        assert_close(fused.linear(x, weight, bias).double(), exact, atol=steps, rtol=0)
    assert asked == {0, *range(16, 209, 16)}


def test_rms_norm_by_hand() -> None:
    x, weight = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])
    root = (12.5) ** 0.5
    assert_close(reference.rms_norm(x, weight, 0.0), torch.tensor([3 / root, 8 / root]))


def test_rotation_keeps_length_and_turns_by_the_difference() -> None:
    """What a query sees of a key depends on their distance only (Su et al. 2021)."""
    q, k = drawn(1, 1, 1, 8), drawn(1, 1, 1, 8, seed=1)

    def seen(at_q: int, at_k: int) -> float:
        turned_q = reference.rotate(q, *reference.rotary(torch.tensor([[at_q]]), 8, Rotary()))
        turned_k = reference.rotate(k, *reference.rotary(torch.tensor([[at_k]]), 8, Rotary()))
        assert_close(turned_q.norm(), q.norm())
        return float((turned_q * turned_k).sum())

    assert seen(5, 2) == pytest.approx(seen(105, 102), rel=1e-4)
    assert seen(5, 2) != pytest.approx(seen(5, 3), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_attention_on_a_gpu() -> None:
    q, k, v = drawn(2, 4, 7, 64), drawn(2, 2, 7, 64, seed=1), drawn(2, 2, 7, 64, seed=2)
    there = fused.attention(q.cuda(), k.cuda(), v.cuda(), None, True).cpu()
    assert_close(there, reference.attention(q, k, v, None, True), atol=2e-3, rtol=2e-3)
