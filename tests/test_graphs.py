"""Passes that are captured and run again: what is filled up, what is copied where, and that nothing of them waits.

Without a GPU the capture is a pretended one, which keeps the pass and computes it again over the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import pumice
import tiny
from pumice import Question, Sampling, ops
from pumice.config import Rotary
from pumice.engine import graphs
from pumice.engine.graphs import MOST_TOKENS, SIZES, Graphs
from pumice.model import Model, load_from
from pumice.network.llama import Batch
from pumice.ops import Pages
from pumice.source import Source

PAGE = 4


class Kept:
    """A capture that computes the pass again, and counts."""

    def __init__(self, device: torch.device) -> None:
        self.rows: list[int] = []
        self.runs = 0

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        out = compute().clone()
        self.rows.append(len(out))

        def replay() -> None:
            self.runs += 1
            out.copy_(compute())

        return replay, out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_folder(tmp_path_factory.mktemp("graphs") / "hf", family="1.6", lm="mistral")


@pytest.fixture
def model(folder: Path) -> Model:
    return load_from(Source(folder), device="cpu")


def empty(model: Model, pages: int) -> tuple[list[Tensor], list[Tensor]]:
    text = model.config.text
    shape = (pages, text.kv_heads, PAGE, text.head_width)
    keys, values = ([torch.zeros(shape) for _ in range(text.layers)] for _ in range(2))
    return keys, values


@torch.inference_mode()
@pytest.mark.parametrize(("rows", "tokens", "size"), [(1, 1, 1), (2, 1, 2), (3, 1, 4), (5, 1, 8), (1, 3, 4), (2, 3, 8)])
def test_a_replay_is_the_pass(model: Model, rows: int, tokens: int, size: int) -> None:
    """Several steps with other rows, of other lengths, in other pages; keys and values too."""
    network, drawn = model.network, torch.Generator().manual_seed(rows * 10 + tokens)
    mine, theirs = empty(model, 40), empty(model, 40)
    for each in (*theirs[0], *theirs[1]):
        each.normal_(generator=drawn)
    for ours, other in zip((*mine[0], *mine[1]), (*theirs[0], *theirs[1])):
        ours.copy_(other)
    capture = Kept(network.like.device)
    replayed = Graphs(network, *mine, capture)
    for step in range(3):
        starts = torch.randint(0, 20, (rows, 1), generator=drawn)
        positions = starts + torch.arange(tokens)
        table = torch.randperm(40, generator=drawn)[: rows * 6].view(rows, 6)[:, : int(positions.max()) // PAGE + 1]
        x = torch.randn(rows, tokens, network.config.text.width, generator=drawn)
        kept = None if rows > 1 else min(tokens, 1 + step % 2)
        batch = Batch(positions, pages=Pages(*theirs, table), kept=kept, reach_B=positions[:, -1])
        expected = network(x, batch)
        got = replayed(x, replace(batch, pages=Pages(*mine, table)))
        assert_close(got, expected, atol=1e-5, rtol=1e-5)
        for ours, other in zip((*mine[0], *mine[1]), (*theirs[0], *theirs[1])):
            assert_close(ours, other, atol=1e-5, rtol=1e-5)
    assert (capture.rows, capture.runs) == ([size], 3)


@torch.inference_mode()
@pytest.mark.parametrize(("rows", "tokens"), [(SIZES[-1] + 1, 1), (1, MOST_TOKENS + 1)])
def test_large_passes_are_not_captured(model: Model, rows: int, tokens: int) -> None:
    keys, values = empty(model, 80)
    capture = Kept(model.network.like.device)
    x = torch.randn(rows, tokens, model.config.text.width)
    positions, table = torch.arange(tokens).expand(rows, tokens), torch.arange(80)[:rows, None].expand(rows, 1)
    table = table if tokens <= PAGE else torch.arange(3)[None]
    batch = Batch(positions, pages=Pages(keys, values, table), reach_B=positions[:, -1])
    Graphs(model.network, keys, values, capture)(x, batch)
    assert not capture.rows


def test_answers_are_those_without_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that join and leave, and drafts."""
    asked = [
        Question(text, sampling=Sampling(max_tokens=count))
        for text, count in (
            ("What is shown?", 12),
            ("the sign says stop the sign says", 20),
            ("How many?", 3),
            ("go", 16),
        )
    ]
    plain = load_from(Source(folder), device="cpu").ask_all(asked)
    captures: list[Kept] = []

    def made(device: torch.device) -> Kept:
        captures.append(Kept(device))
        return captures[-1]

    monkeypatch.setattr(graphs, "Captured", made)
    monkeypatch.setattr(ops, "captures", lambda x: True)
    model = load_from(Source(folder), device="cpu")
    assert [each.tokens for each in model.ask_all(asked)] == [each.tokens for each in plain]
    assert model.ask("What is shown?", sampling=asked[0].sampling).tokens == plain[0].tokens
    assert captures[0].runs > 20
    assert set(captures[0].rows) <= set(SIZES)


# --- nothing waits ----------------------------------------------------------------------------------------------------


class NothingWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, or copies from it, none of which a graph can hold."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, f"{name} would wait for the GPU"
        if name in ("index", "index_put", "index_put_"):
            assert not any(each is not None and each.dtype == torch.bool for each in args[1]), (
                "a mask as an index waits"
            )
        return func(*args, **(kwargs or {}))


def refused(*values: object, **settings: object) -> Tensor:
    """`torch.tensor`, which copies from the host; the dispatcher does not see it."""
    raise AssertionError("a tensor is copied from the host")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels, which do not wait, stood for by results of their shapes."""
    stand_in = SimpleNamespace(
        linear=lambda x, weight, bias: x.new_zeros(*x.shape[:-1], weight.shape[0]),
        embed=lambda ids, weight: torch.zeros(*ids.shape, weight.shape[1], dtype=weight.dtype),
        attention_in_pages=lambda q, pages, positions, window: q.transpose(1, 2).contiguous().transpose(1, 2),
    )
    monkeypatch.setattr(ops, "_by_kernels", lambda x: False)
    monkeypatch.setattr(ops, "_by_triton", lambda x: stand_in)


DIVISORS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
ROTARIES = [Rotary(), Rotary(divisors=DIVISORS), Rotary(divisors=DIVISORS, long_divisors=DIVISORS[::-1], switch=9)]


@torch.no_grad()  # in inference mode the dispatcher would see whole operations instead of their parts
@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("rotary", ROTARIES, ids=["plain", "llama3", "longrope"])
@pytest.mark.parametrize("quant", [None, "Q4_0", "F16"])
def test_nothing_of_a_captured_pass_waits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str | None, rotary: Rotary
) -> None:
    name = folder
    if quant is not None:
        name = tmp_path / "model.gguf"
        pumice.convert(folder, name, quant=quant)
    network = load_from(Source(name), device="cpu").network
    language_model = network.language_model
    language_model.config = replace(language_model.config, rotary=rotary, window=8)
    for block in language_model.layers:
        block.self_attn.window = 8
    text = network.config.text
    kept = [torch.zeros(8, text.kv_heads, PAGE, text.head_width, dtype=torch.float16) for _ in range(2 * text.layers)]
    pages = Pages(kept[: text.layers], kept[text.layers :], torch.arange(6).view(2, 3))
    positions = torch.tensor([[9], [5]])
    batch = Batch(positions, pages=pages, reach_B=positions[:, 0])
    x = torch.randn(2, 1, text.width, dtype=network.like.dtype)
    network(x, batch)  # makes what is made once
    monkeypatch.setattr(torch, "tensor", refused)
    with NothingWaits():
        network(x, batch)


@torch.no_grad()
def test_waiting_is_noticed() -> None:
    """The check above can fail: each of these waits on a GPU."""
    x = torch.arange(4.0)
    for waits in (lambda: x.max().item(), lambda: x[x > 2], lambda: int(x[0]), lambda: (x > 1).nonzero()):
        with pytest.raises(AssertionError, match="wait"), NothingWaits():
            waits()


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_answers_by_graphs_on_a_gpu(folder: Path) -> None:
    asked = [
        Question("What is shown?", sampling=Sampling(max_tokens=12)),
        Question("go", sampling=Sampling(max_tokens=20)),
    ]
    expected = [each.tokens for each in load_from(Source(folder), device="cpu").ask_all(asked)]
    model = load_from(Source(folder), device="cuda")
    assert isinstance(model.engine._passes._forward, Graphs)
    assert [each.tokens for each in model.ask_all(asked)] == expected
