"""Small passes as CUDA graphs: for few positions, launching hundreds of kernels takes longer than they run.

A graph is captured for a number of rows and replayed for that many and fewer, which are filled up with the last one
again: it computes the same keys and values, and puts them to the same places.

B rows · T positions of a row · R rows of a graph · P pages of a row · D width · N pages · K key/value heads ·
S positions of a page · E width of a head
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pumice.network.llama import Batch
from pumice.network.llava import Llava
from pumice.ops import Pages

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Rows of the graphs."""
MOST_TOKENS = 8
"""Positions of one row, which are rows of their own in a graph: more of them read their keys better together."""

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""From a pass over memory that stays where it is: what runs it again, and where its result then is."""


class Graphs:
    """Called as the network is, with the same result. One thread at a time may call it."""

    def __init__(
        self, network: Llava, keys: Sequence[Tensor], values: Sequence[Tensor], capture: Capture | None = None
    ) -> None:
        """keys, values: of each layer, (N, K, S, E), those of every pass. capture: None is CUDA's."""
        self._network, self._keys, self._values = network, keys, values
        self._columns = -(-network.config.text.max_positions // keys[0].shape[2])
        self._capture = capture or Captured(network.like.device)
        self._graphs: dict[int, _Graph] = {}

    def __call__(self, x_BTD: Tensor, batch: Batch) -> Tensor:
        """Hidden states after the final norm, as `Llava.forward` gives them."""
        rows, tokens, width = x_BTD.shape
        size = next((each for each in SIZES if each >= rows * tokens), None)
        pages, reach_B = batch.pages, batch.reach_B
        assert pages is not None, "a graph has its keys and values in pages"
        assert reach_B is not None, "how far rows reach is not known"
        if size is None or tokens > MOST_TOKENS or pages.table_RP.shape[1] > self._columns:
            hidden_BTD: Tensor = self._network(x_BTD, batch)
            return hidden_BTD
        if size not in self._graphs:
            self._graphs[size] = _Graph(size, x_BTD, Pages(self._keys, self._values, self._empty_table(size)))
        graph = self._graphs[size]
        positions_R1 = batch.positions_BT.expand(rows, tokens).reshape(-1, 1)
        each_R = [each.repeat_interleave(tokens, 0) for each in (pages.table_RP, reach_B)]
        graph.fill(x_BTD.reshape(-1, 1, width), positions_R1, *each_R)
        hidden_RD = graph.run(self._network, self._capture)[: rows * tokens]
        kept = tokens if batch.kept is None else batch.kept
        return hidden_RD.view(rows, tokens, width)[:, tokens - kept :].clone()

    def _empty_table(self, size: int) -> Tensor:
        return torch.zeros(size, self._columns, dtype=torch.int64, device=self._network.like.device)


class _Graph:
    """One size: where its inputs lie, and what runs it."""

    def __init__(self, size: int, like_BTD: Tensor, pages: Pages) -> None:
        self._x_R1D = like_BTD.new_zeros(size, 1, like_BTD.shape[2])
        self._positions_R1 = torch.zeros(size, 1, dtype=torch.int64, device=like_BTD.device)
        self._reach_R = torch.zeros(size, dtype=torch.int64, device=like_BTD.device)
        self._pages = pages
        self._captured: tuple[Callable[[], None], Tensor] | None = None

    def fill(self, x_R1D: Tensor, positions_R1: Tensor, table_RP: Tensor, reach_R: Tensor) -> None:
        """The inputs of the next run. Of a table with fewer columns the others stay, and no position reaches them."""
        rows, columns = table_RP.shape
        given = (x_R1D, positions_R1, table_RP, reach_R)
        lies = (self._x_R1D, self._positions_R1, self._pages.table_RP[:, :columns], self._reach_R)
        for each, there in zip(given, lies):
            there[:rows] = each
            there[rows:] = each[-1:]

    def run(self, network: Llava, capture: Capture) -> Tensor:
        """Hidden states, (R, D), which the next run overwrites."""
        if self._captured is None:
            batch = Batch(self._positions_R1, pages=self._pages, reach_B=self._reach_R)
            self._captured = capture(lambda: network(self._x_R1D, batch)[:, 0])
        replay, hidden_RD = self._captured
        replay()
        return hidden_RD


class Captured:
    """CUDA's capture. All graphs share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with torch.cuda.device(self._device):
            # The first pass compiles kernels and makes what is made once, neither of which a graph can hold.
            side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                compute()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Another thread may copy pages to the disk meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = compute()
        return graph.replay, out
